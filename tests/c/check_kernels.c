/* SPDX-License-Identifier: MIT */
/* Checks csrc without Python: every kernel of every instruction set this machine can run against the scalar one, bit
 * for bit, and the scalar one against arithmetic in double. Buffers end where the contract says that access ends, so
 * that -fsanitize=address sees what reads or writes beyond. Link with all of csrc, each file of x86/ or arm/ compiled
 * with the flags that setup.py gives it. Exit status 0 when all checks pass.
 *
 * An argument N leaves out all but one in N of the tiles, activations and attentions: an emulator takes minutes for all
 * of them. Each instruction set ends with a digest of its results, which is the same on every machine. */
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/atomic.h"
#include "../../csrc/kernels.h"
#include "../../csrc/pool.h"

static const double EPS = 0x1p-24;   /* relative error of one float rounding */
static const double TINY = 0x1p-149; /* the least subnormal: absolute error of one that underflows */

static phi3c_kernels scalar, tested;

/* -- counting --------------------------------------------------------------------------------------------- */

static long passed, failed, passed_before, failed_before;

static void check(int ok, const char *format, ...) {
    ok ? passed++ : failed++;
    if (ok || failed - failed_before > 5) return; /* five of an operation are enough to see what is wrong */
    va_list args;
    va_start(args, format);
    printf("  FAILED: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

static void report(const char *subject, const char *operation) {
    printf("%-7s %-24s %7ld passed %5ld failed\n", subject, operation, passed - passed_before, failed - failed_before);
    fflush(stdout);
    passed_before = passed;
    failed_before = failed;
}

static int share = 1, candidates; /* one of `share` candidates is checked */
static int left_out(void) { return candidates++ % share != 0; }

/* Equal bits, or both NaN: which NaN comes out of an operation on two is the processor's business. */
static int same(float a, float b) { return memcmp(&a, &b, 4) == 0 || (isnan(a) && isnan(b)); }

static int all_same(const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!same(a[i], b[i])) return 0;
    return 1;
}

static uint64_t digest; /* FNV-1a of results by 32-bit words, all NaNs alike */

static void digest_words(const void *words, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 4) {
        uint32_t bits;
        memcpy(&bits, (const uint8_t *)words + i, 4);
        if ((bits & 0x7fffffff) > 0x7f800000) bits = 0x7fc00000;
        digest = (digest ^ bits) * 0x100000001b3u;
    }
}

static void digest_floats(const float *x, int64_t n) { digest_words(x, (size_t)n * sizeof *x); }

/* -- random numbers --------------------------------------------------------------------------------------- */

static uint64_t state = 1;

static uint64_t random64(void) { /* splitmix64 */
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int below(int n) { return (int)(random64() % (uint64_t)n); }
static float uniform(void) { return (float)below(1 << 24) * 0x1p-23f - 1.0f; } /* [-1, 1) */

static float normal(void) { /* near enough, variance 1 */
    float sum = uniform();
    sum += uniform();
    return sum + uniform();
}

static void *exactly(size_t n_bytes) {
    void *memory = malloc(n_bytes ? n_bytes : 1);
    if (!memory) exit(2);
    return memory;
}

static void *copy_of(const void *from, size_t n_bytes) { return memcpy(exactly(n_bytes), from, n_bytes); }

/* -- weights ---------------------------------------------------------------------------------------------- */

/* Where the halves of a block lie; -1: none. A zero second scale leaves the part of the weights that `d` scales. */
static const struct {
    const char *name;
    int type, d, min;
} types[] = {
    {"f32", PHI3C_F32, -1, -1},    {"f16", PHI3C_F16, -1, -1},      {"bf16", PHI3C_BF16, -1, -1},
    {"q4_0", PHI3C_Q4_0, 0, -1},   {"q4_1", PHI3C_Q4_1, 0, 2},      {"q5_0", PHI3C_Q5_0, 0, -1},
    {"q5_1", PHI3C_Q5_1, 0, 2},    {"q8_0", PHI3C_Q8_0, 0, -1},     {"q2_K", PHI3C_Q2_K, 80, 82},
    {"q3_K", PHI3C_Q3_K, 108, -1}, {"q4_K", PHI3C_Q4_K, 0, 2},      {"q5_K", PHI3C_Q5_K, 0, 2},
    {"q6_K", PHI3C_Q6_K, 208, -1}, {"iq4_nl", PHI3C_IQ4_NL, 0, -1}, {"iq4_xs", PHI3C_IQ4_XS, 0, -1},
};
enum { N_TYPES = sizeof types / sizeof *types };

static int is_float(int type) { return type == PHI3C_F32 || type == PHI3C_F16 || type == PHI3C_BF16; }

static size_t row_bytes(int type, int64_t columns) {
    return (size_t)(columns / phi3c_block_columns(type)) * (size_t)phi3c_block_bytes(type);
}

static f16 random_half(int extreme) {
    static const f16 edges[] = {0, 0x8000, 1, 0x8001, 0x03ff, 0x0400, 0x7bff, 0xfbff}; /* to +-65504 */
    if (extreme) return edges[below(8)];
    int sign = below(2), exponent = 5 + below(12);
    return (f16)(sign << 15 | exponent << 10 | below(1024));
}

/* A row of blocks. Kind 0: random; 1: random, extreme scales; 2-5: all bytes equal, so that codes and integer scales
 * are at their least or greatest, random or extreme scales. */
enum { BLOCK_KINDS = 6 };

static void random_row(uint8_t *blocks, int t, int64_t columns, int kind) {
    static const uint8_t fill[BLOCK_KINDS] = {0, 0, 0xff, 0x00, 0x80, 0x7f};
    int type = types[t].type, n_bytes = phi3c_block_bytes(type);
    for (int64_t c = 0; c < columns; c += phi3c_block_columns(type), blocks += n_bytes) {
        for (int i = 0; i < n_bytes; i++) blocks[i] = kind < 2 ? (uint8_t)random64() : fill[kind];
        if (type == PHI3C_Q6_K && kind == 2) memset(blocks + 192, 0x7f, 16); /* greatest codes with scales 127 */
        if (type == PHI3C_Q6_K && kind == 3) memset(blocks + 192, 0x80, 16); /* least codes with scales -128 */
        for (int i = 0; is_float(type) && i < 32; i++) {
            f16 h = random_half(kind > 1);
            float f = kind > 1 && below(2) ? 0x1p-140f * uniform() : f16_to_f32(h);
            if (type == PHI3C_F32)
                memcpy(blocks + 4 * i, &f, 4);
            else if (type == PHI3C_F16)
                memcpy(blocks + 2 * i, &h, 2);
            else
                memcpy(blocks + 2 * i, (uint8_t *)&f + 2, 2);
        }
        f16 d = random_half(kind == 1 || below(2)), min = random_half(kind == 1 || below(2));
        if (types[t].d >= 0) memcpy(blocks + types[t].d, &d, 2);
        if (types[t].min >= 0) memcpy(blocks + types[t].min, &min, 2);
    }
}

/* Weights of a row, and how large the numbers are whose difference they may be. */
static void dequantize(float *w, float *size, const uint8_t *blocks, int t, int64_t columns) {
    size_t n_bytes = row_bytes(types[t].type, columns);
    uint8_t *part = exactly(n_bytes);
    float *other = exactly((size_t)columns * 4);
    phi3c_dequantize_row(w, blocks, types[t].type, columns);
    for (int64_t c = 0; c < columns; c++) size[c] = fabsf(w[c]);
    for (int zeroed = 0; types[t].min >= 0 && zeroed < 2; zeroed++) {
        memcpy(part, blocks, n_bytes);
        for (size_t b = 0; b < n_bytes; b += (size_t)phi3c_block_bytes(types[t].type))
            memset(part + b + (zeroed ? types[t].d : types[t].min), 0, 2);
        phi3c_dequantize_row(other, part, types[t].type, columns);
        for (int64_t c = 0; c < columns; c++) size[c] += fabsf(other[c]);
    }
    free(other);
    free(part);
}

static void check_pack(int t, int64_t columns, phi3c_pool *pool) {
    enum { ROWS = 37 };
    int type = types[t].type;
    size_t n_bytes = row_bytes(type, columns);
    uint8_t *src = exactly(ROWS * n_bytes), *panels = exactly(phi3c_packed_bytes(type, ROWS, columns));
    uint8_t *row = exactly(n_bytes);
    int64_t order[ROWS];
    for (int r = 0; r < ROWS; r++) {
        random_row(src + (size_t)r * n_bytes, t, columns, r % BLOCK_KINDS);
        int other = below(r + 1);
        order[r] = order[other];
        order[other] = r;
    }
    for (int permuted = 0; permuted < 2; permuted++) {
        phi3c_pack(panels, src, type, ROWS, columns, permuted ? order : NULL, pool);
        for (int r = 0; r < ROWS; r++) {
            phi3c_unpack_row(row, panels, type, r, columns);
            int64_t from = permuted ? order[r] : r;
            check(memcmp(row, src + (size_t)from * n_bytes, n_bytes) == 0, "columns %d row %d", (int)columns, r);
        }
    }
    free(row);
    free(panels);
    free(src);
}

/* -- activations ------------------------------------------------------------------------------------------ */

/* Kinds 0-10 are finite and of a usual size; 11 huge, 12 subnormal, 13 infinite and 14 NaN in one place. */
enum { USUAL_KINDS = 11, ROW_KINDS = 15 };

/* Groups of one sign whose codes add up to just what fits 16 bits, or to one more: of 16 columns, the others 0 (brim 0,
 * 1), or of 32 (2, 3). The largest is 127, so that each is its own code. */
static float brimful(int64_t c, int brim) {
    int most = (brim < 2 ? MOST_OF_16 : MOST_OF_SIGN) + brim % 2, at = (int)(c % 32);
    float code = at < most / 127 ? 127.0f : at == most / 127 ? (float)(most % 127) : 0.0f;
    return c / 32 % 2 ? -code : code;
}

static void random_activation(float *x, int64_t columns, int kind) {
    int outlier = below((int)columns), brim = below(4);
    for (int64_t c = 0; c < columns; c++) {
        float u = normal();
        switch (kind) {
        case 2: x[c] = 0.0f; break;
        case 3: x[c] = c == outlier ? 1000.0f : u * 0.01f; break;
        case 4: x[c] = 1.0f; break; /* all codes 127 at the largest factor: every sum at its bound */
        case 5: x[c] = -1.0f; break;
        case 6: x[c] = c % 4 < 2 ? 2.5f : -2.5f; break; /* both int16 sums of a lane at their bounds */
        case 7: x[c] = u * (float)(c / 256 % 2 ? 1 << (c / 32 % 6) : c / 32 % 8 + 1); break; /* every factor */
        case 8: x[c] = c / 16 % 2 ? -0.0f : (float)below(255) - 127.0f; break; /* ties and exact quotients */
        case 9: /* as many outliers as there can be, 25 of 256, and few */
            x[c] = c / 256 % 2                    ? u * (c % 96 == 7 ? 50.0f : 1.0f)
                   : c % 256 < 250 && c % 10 == 5 ? 90.0f + 0.1f * u
                                                  : 0.0f;
            break;
        case 10: x[c] = brimful(c, brim); break;
        case 11: x[c] = u * 1e38f; break;
        case 12: x[c] = u * 0x1p-130f; break;
        default: x[c] = u;
        }
    }
    if (kind == 13) x[outlier] = -INFINITY;
    if (kind == 14) x[outlier] = NAN;
}

/* Quantise a row. What the kernel leaves of the memory is noise, as it is in use. */
static uint8_t *quantised(const phi3c_kernels *kernels, uint8_t *x8, const float *x, int64_t columns) {
    for (size_t i = 0; i < phi3c_x8_bytes(columns); i++) x8[i] = (uint8_t)random64();
    kernels->quantize_row((block_x8 *)x8, (outliers_x8 *)outliers_of(x8, columns), x, columns);
    return x8;
}

static int same_outliers(const outliers_x8 *a, const outliers_x8 *b) {
    return a->n == b->n && memcmp(a->x, b->x, a->n * sizeof a->x[0]) == 0 && memcmp(a->column, b->column, a->n) == 0;
}

static int same_rows(const uint8_t *a, const uint8_t *b, int64_t columns) {
    int same = memcmp(a, b, (size_t)supers_of(columns) * sizeof(block_x8)) == 0;
    for (int64_t i = 0; i < supers_of(columns); i++)
        same &= same_outliers(outliers_of(a, columns) + i, outliers_of(b, columns) + i);
    return same;
}

/* What a block makes of activation c. */
static double activation_at(const block_x8 *b, const outliers_x8 *outliers, int c) {
    for (int i = 0; i < outliers->n; i++)
        if (outliers->column[i] == c) return (double)outliers->x[i];
    return (double)b->factor[c / 32] * b->d * b->q[c];
}

static void check_codes(const block_x8 *b, int something) {
    int sums = 1, codes = 1, wide = 1;
    for (int j = 0; j < 8; j++) {
        int sum[2] = {0, 0}, of_16[2] = {0, 0}, of_sign[2] = {0, 0}, factor = b->factor[j];
        codes &= something ? factor >= 1 && factor <= 8 : factor == 0;
        for (int i = 0; i < 32; i++) {
            int q = b->q[32 * j + i];
            sum[i / 16] += q;
            of_16[i / 16] += abs(q);
            of_sign[q < 0] += abs(q);
            codes &= something ? q >= -127 : q == 0;
        }
        wide &= (b->wide16 >> j & 1) == (of_16[0] > MOST_OF_16 || of_16[1] > MOST_OF_16);
        wide &= (b->wide32 >> j & 1) == (of_sign[0] > MOST_OF_SIGN || of_sign[1] > MOST_OF_SIGN);
        sums &= b->sum32[j] == (sum[0] + sum[1]) * factor;
        for (int i = 0; i < 2; i++) sums &= b->nsum16[2 * j + i] == -sum[i];
    }
    check(sums, "sums");
    check(codes, "|q| <= 127, factor 1-8, both 0 for nothing");
    check(wide, "groups whose sums may not fit 16 bits");
}

static void check_block(const block_x8 *b, const outliers_x8 *outliers, const float *x, int n) {
    double sum = 0, largest = 0; /* of all; of the others than outliers */
    int finite = 1, listed = 1, found = 1, near = 1;
    int next = 0;
    for (int i = 0; i < n && finite; i++) {
        finite = isfinite(x[i]) != 0;
        sum += fabsf(x[i]);
    }
    double limit = OUTLIER * sum / n, doubt = limit * 20 * EPS + TINY; /* a sum of 16 per lane, a tree, two more */
    for (int i = 0; i < n; i++) {
        int apart = next < outliers->n && outliers->column[next] == i;
        if (apart) listed &= outliers->x[next++] == x[i] && b->q[i] == 0;
        if (finite && isfinite((float)(OUTLIER * sum)) && fabs(fabsf(x[i]) - limit) > doubt)
            found &= apart == (fabsf(x[i]) > limit);
        if (!apart && fabsf(x[i]) > largest) largest = fabsf(x[i]); /* fmax here crashes gcc 12 for aarch64 */
    }
    check(next == outliers->n && listed, "%d outliers, once each, by column, with code 0", outliers->n);
    check(found, "outliers are those above %g", limit);

    int something = finite && largest >= 0x1p-100;
    check_codes(b, something);
    check(finite ? b->d >= 0 && (b->d > 0) == something : isnan(b->d), "scale %g", (double)b->d);
    if (!something) return;
    check(fabs(b->d * 1016.0 - largest) <= 2 * EPS * largest, "scale %g for %g", (double)b->d, largest);
    for (int j = 0; j < n / 32; j++) {
        double group = 0, step = (double)b->factor[j] * b->d;
        for (int i = 32 * j; i < 32 * j + 32; i++) {
            double kept = activation_at(b, outliers, i);
            if (b->q[i] || kept == 0) group = fmax(group, fabsf(x[i]));
            /* half a step, and the three roundings of 1016 / largest, / factor and * x, each relative to q */
            near &= fabs(x[i] - kept) <= step * (0.5 + 127 * 5 * EPS);
        }
        check(group * 8 <= b->factor[j] * largest * (1 + 4 * EPS), "group %d is cut", j);
        check(b->factor[j] == 1 || group * 8 >= (b->factor[j] - 1) * largest * (1 - 4 * EPS), "group %d could be finer",
              j);
    }
    check(near, "activations are further than half a step away");
}

static void check_quantize(void) {
    static const int widths[] = {32, 96, 256, 288, 768};
    for (int w = 0; w < 5; w++)
        for (int kind = 0; kind < ROW_KINDS; kind++)
            for (int round = 0; round < 8; round++) {
                if (left_out()) continue;
                int64_t columns = widths[w];
                size_t x8_bytes = phi3c_x8_bytes(columns);
                float *x = exactly((size_t)columns * 4);
                random_activation(x, columns, kind);
                uint8_t *expected = quantised(&scalar, exactly(x8_bytes), x, columns);
                uint8_t *got = quantised(&tested, exactly(x8_bytes), x, columns);
                check(same_rows(expected, got, columns), "columns %d kind %d", (int)columns, kind);
                for (int64_t i = 0; i < supers_of(columns); i++) {
                    const block_x8 *block = (block_x8 *)got + i;
                    const outliers_x8 *outliers = outliers_of(got, columns) + i;
                    digest_words(block, sizeof *block);
                    digest_words(outliers->x, outliers->n * sizeof outliers->x[0]);
                    check_block(block, outliers, x + 256 * i, columns - 256 * i < 256 ? (int)(columns - 256 * i) : 256);
                }
                free(got);
                free(expected);
                free(x);
            }
}

/* Rows as blocks: refused where the type cannot hold them, else never further off than half the largest magnitude, or
 * lost where a scale would be below the least half; and the same on more threads. */
static void check_encode(int t, int64_t columns, phi3c_pool *one, phi3c_pool *three) {
    enum { ROWS = 70 }; /* more than a thread takes at once */
    int type = types[t].type;
    int64_t n = ROWS * columns;
    size_t n_bytes = row_bytes(type, n);
    float *x = exactly((size_t)n * 4), *got = exactly((size_t)n * 4);
    uint8_t *blocks = exactly(n_bytes), *again = exactly(n_bytes);
    for (int kind = 0; kind < ROW_KINDS; kind++) {
        random_activation(x, n, kind);
        float limit = type == PHI3C_F32 || type == PHI3C_BF16 ? FLT_MAX : 65504.0f, largest = 0.0f, furthest = 0.0f;
        int fits = 1;
        for (int64_t i = 0; i < n; i++) {
            fits &= fabsf(x[i]) <= limit;
            largest = fmaxf(largest, fabsf(x[i]));
        }
        int status = phi3c_encode(blocks, type, (uint8_t *)x, PHI3C_F32, n, one);
        check(status == (fits ? 0 : -1), "columns %d kind %d: status %d", (int)columns, kind, status);
        check(phi3c_encode(again, type, (uint8_t *)x, PHI3C_F32, n, three) == status, "status on three threads");
        if (!fits) continue;
        check(memcmp(blocks, again, n_bytes) == 0, "columns %d kind %d: threads", (int)columns, kind);
        phi3c_dequantize_row(got, blocks, type, n);
        for (int64_t i = 0; i < n; i++) furthest = fmaxf(furthest, fabsf(got[i] - x[i]));
        check(furthest <= 0.5f * largest + 0x1p-25f, "columns %d kind %d: %g off %g", (int)columns, kind, furthest,
              largest);
    }
    free(x);
    free(got);
    free(blocks);
    free(again);
}

/* -- tiles ------------------------------------------------------------------------------------------------ */

enum { TOKENS = 13 };

/* The outliers of n rows, in order. */
static outlier_list *lists_of(const uint8_t *rows, size_t stride, int n, int64_t columns) {
    outlier_list *lists = exactly((size_t)supers_of(columns) * list_bytes(n));
    for (int64_t super = 0; super < supers_of(columns); super++) {
        outlier_list *list = (outlier_list *)list_at(lists, super, n);
        list->n = 0;
        for (int column = 0; column < 256; column++)
            for (int row = 0; row < n; row++) {
                const outliers_x8 *outliers = outliers_of(rows + (size_t)row * stride, columns) + super;
                for (int i = 0; i < outliers->n; i++) {
                    if (outliers->column[i] != column) continue;
                    list->outliers[list->n].x = outliers->x[i];
                    list->outliers[list->n].column = (uint16_t)column;
                    list->outliers[list->n++].row = (uint16_t)row;
                }
            }
    }
    return lists;
}

/* Two panels at once give what each gives, whether all columns are multiplied in one go or in two. */
static void check_pair(int type, const uint8_t *panels, const float *const expected[2], const uint8_t *rows,
                       size_t stride, int n, int64_t columns) {
    outlier_list *lists = lists_of(rows, stride, n, columns);
    size_t bytes = phi3c_packed_bytes(type, 16, columns);
    float *got = exactly((size_t)n * 2 * 16 * 4);
    for (int64_t supers = 0; supers < supers_of(columns); supers++) { /* of the first go */
        memset(got, 0, (size_t)n * 2 * 16 * 4);
        if (supers) tested.pair[type](got, panels, bytes, rows, stride, n, supers * 256, lists);
        tested.pair[type](got, panels + phi3c_packed_bytes(type, 16, supers * 256), bytes,
                          rows + (size_t)supers * sizeof(block_x8), stride, n, columns - supers * 256,
                          list_at(lists, supers, n));
        for (int i = 0; i < 2; i++)
            check(all_same(got + i * n * 16, expected[i], n * 16),
                  "columns %d, %d of the super-blocks first, %d tokens, panel %d of 2", (int)columns, (int)supers, n,
                  i);
    }
    free(got);
    free(lists);
}

/* So many tokens that their scales come out of a table: the same ones over and over. */
static void check_many(int type, const uint8_t *panels, float expected[2][TOKENS * 16], const uint8_t *x, size_t stride,
                       int64_t columns) {
    enum { TIMES = 3, N = TIMES * TOKENS };
    uint8_t *rows = exactly(N * stride);
    float *many[2];
    for (int k = 0; k < TIMES; k++) memcpy(rows + (size_t)k * TOKENS * stride, x, TOKENS * stride);
    for (int i = 0; i < 2; i++) {
        many[i] = exactly(N * 16 * 4);
        for (int k = 0; k < TIMES; k++) memcpy(many[i] + k * TOKENS * 16, expected[i], TOKENS * 16 * 4);
    }
    check_pair(type, panels, (const float *const *)many, rows, stride, N, columns);
    free(many[0]);
    free(many[1]);
    free(rows);
}

/* Panels of rows of every kind times tokens of every kind. */
static void check_tile(int t, int64_t columns, int round, phi3c_pool *pool) {
    int type = types[t].type;
    size_t n_bytes = row_bytes(type, columns), x8_bytes = phi3c_x8_bytes(columns), x_bytes = (size_t)columns * 4;
    size_t panel_bytes = phi3c_packed_bytes(type, 16, columns);
    uint8_t *src = exactly(32 * n_bytes), *panels = exactly(2 * panel_bytes);
    float *x = exactly(TOKENS * x_bytes), expected[2][TOKENS * 16];
    uint8_t *x8 = exactly(TOKENS * x8_bytes);
    for (int r = 0; r < 32; r++) random_row(src + (size_t)r * n_bytes, t, columns, (r + r / 16 + round) % BLOCK_KINDS);
    phi3c_pack(panels, src, type, 32, columns, NULL, pool);
    uint8_t *panel = copy_of(panels, panel_bytes); /* of its own, so that a read beyond it is seen */
    for (int i = 0; i < TOKENS; i++) {
        random_activation(x + i * columns, columns, (i + round) % ROW_KINDS);
        quantised(&scalar, x8 + (size_t)i * x8_bytes, x + i * columns, columns);
    }
    const uint8_t *input = is_float(type) ? (const uint8_t *)x : x8;
    size_t stride = is_float(type) ? x_bytes : x8_bytes;
    for (size_t i = 0; i < 2; i++)
        scalar.tile[type](expected[i], panels + i * panel_bytes, input, stride, TOKENS, columns, NULL);

    for (int n = 1; n <= TOKENS; n++) {
        uint8_t *rows = copy_of(input + (size_t)(TOKENS - n) * stride, (size_t)n * stride);
        float *got = exactly((size_t)n * 16 * 4);
        tested.tile[type](got, panel, rows, stride, n, columns, NULL);
        check(all_same(got, expected[0] + (TOKENS - n) * 16, n * 16), "columns %d, %d tokens", (int)columns, n);
        digest_floats(got, n * 16);
        if (!is_float(type)) {
            outlier_list *lists = lists_of(rows, stride, n, columns);
            memset(got, 0xff, (size_t)n * 16 * 4); /* NaN */
            tested.tile[type](got, panel, rows, stride, n, columns, lists);
            check(all_same(got, expected[0] + (TOKENS - n) * 16, n * 16), "columns %d, %d tokens, outliers sorted",
                  (int)columns, n);
            const float *const last[2] = {expected[0] + (TOKENS - n) * 16, expected[1] + (TOKENS - n) * 16};
            if (tested.pair[type]) check_pair(type, panels, last, rows, stride, n, columns);
            free(lists);
        }
        free(got);
        free(rows);
    }

    if (tested.pair[type]) check_many(type, panels, expected, input, stride, columns);

    float *w = exactly(x_bytes), *size = exactly(x_bytes);
    for (int r = 0; strcmp(tested.name, "scalar") == 0 && r < 16; r++) {
        dequantize(w, size, src + (size_t)r * n_bytes, t, columns);
        for (int i = 0; i < TOKENS; i++) {
            if ((i + round) % ROW_KINDS >= USUAL_KINDS) continue;
            const uint8_t *row = x8 + (size_t)i * x8_bytes;
            double sum = 0, magnitude = 0, n_outliers = 0;
            for (int64_t c = 0; c < columns; c++) {
                const outliers_x8 *outliers = outliers_of(row, columns) + c / 256;
                double a = x[i * columns + c];
                if (!is_float(type)) a = activation_at((const block_x8 *)row + c / 256, outliers, (int)(c % 256));
                if (c % 256 == 0) n_outliers += outliers->n;
                sum += w[c] * a;
                magnitude += size[c] * fabs(a);
            }
            /* of a float type: a chain of columns / 4 and two additions. Of the others: two a group of 32, three a
             * super-block, one for each integer made a float, two an outlier; and three in dequantize_row. */
            double roundings = (double)columns / 4 + 3;
            if (!is_float(type)) roundings = 2.0 * 8 + 3.0 * (double)supers_of(columns) + 2 + 2 * n_outliers + 3;
            double error = fabs(expected[0][i * 16 + r] - sum);
            check(error <= roundings * (EPS * magnitude + TINY), "columns %d row %d: %g is off by %g of %g",
                  (int)columns, r, sum, error, magnitude);
        }
    }
    free(size);
    free(w);
    free(x8);
    free(x);
    free(panel);
    free(panels);
    free(src);
}

static int runs_on(int type, int64_t columns) { return columns % phi3c_block_columns(type) == 0; }

/* -- element-wise operations ------------------------------------------------------------------------------ */

static void check_rms_norm(void) {
    for (int64_t columns = 32; columns <= 1056; columns += 128)
        for (int kind = 0; kind < ROW_KINDS; kind++) {
            size_t n_bytes = (size_t)columns * 4;
            float *x = exactly(n_bytes), *weight = exactly(n_bytes), *got = exactly(n_bytes),
                  *expected = exactly(n_bytes);
            random_activation(x, columns, kind);
            random_activation(weight, columns, 0);
            scalar.rms_norm_row(expected, x, weight, 1e-5f, columns);
            tested.rms_norm_row(got, x, weight, 1e-5f, columns);
            check(all_same(got, expected, columns), "columns %d kind %d", (int)columns, kind);
            digest_floats(got, columns);
            double squares = 0;
            for (int64_t c = 0; c < columns; c++) squares += (double)x[c] * x[c];
            double scale = 1 / sqrt(squares / (double)columns + 1e-5f);
            for (int64_t c = 0; kind < USUAL_KINDS && c < columns; c++) { /* 16 chains, a tree of 4, 6 operations */
                double y = x[c] * scale * weight[c];
                check(fabs(got[c] - y) <= fabs(y) * ((double)columns / 16 + 4 + 6) * EPS + 2 * TINY, "%g, not %g",
                      (double)got[c], y);
            }
            free(expected);
            free(got);
            free(weight);
            free(x);
        }
}

static void check_silu_mul(void) {
    enum { N = 1 << 16 };
    static const float specials[16] = {0.0f,      -0.0f,    INFINITY,  -INFINITY, NAN,        FLT_MAX,
                                       -FLT_MAX,  FLT_MIN,  -FLT_MIN,  0x1p-149f, -0x1p-149f, 87.3365f,
                                       -87.3365f, 88.7229f, -88.7229f, -89.0f};
    float *gate = exactly(N * 4), *up = exactly(N * 4), *got = exactly(N * 4), *expected = exactly(N * 4);
    for (int i = 0; i < N; i++) {
        gate[i] = i < 256 ? specials[i % 16] : uniform() * 100.0f;
        up[i] = i < 256 ? specials[i / 16] : normal();
    }
    scalar.silu_mul_row(expected, gate, up, N);
    tested.silu_mul_row(got, gate, up, N);
    digest_floats(got, N);
    for (int i = 0; i < N; i++) {
        check(same(got[i], expected[i]), "silu(%g) * %g: %a, not %a", (double)gate[i], (double)up[i], (double)got[i],
              (double)expected[i]);
        if (i < 256) continue;
        /* exp within 1 ulp, that is 2 EPS, and three roundings. Below -88.7 exp(-x) is infinite, the result 0 where
         * |silu| is at most 88.7 exp(-88.7) < 2^-121. */
        double y = gate[i] / (1 + exp(-(double)gate[i])) * up[i];
        check(fabs(got[i] - y) <= fabs(y) * 5 * EPS + 0x1p-121 * fabsf(up[i]), "silu(%g) * %g = %g, not %g",
              (double)gate[i], (double)up[i], (double)got[i], y);
    }
    for (int n = 32; n <= 256; n += 32) { /* exact buffers */
        float *g = copy_of(gate + N / 2, (size_t)n * 4), *u = copy_of(up + N / 2, (size_t)n * 4),
              *y = exactly((size_t)n * 4);
        tested.silu_mul_row(y, g, u, n);
        check(all_same(y, expected + N / 2, n), "n %d", n);
        free(y);
        free(u);
        free(g);
    }
    free(expected);
    free(got);
    free(up);
    free(gate);
}

static void check_one_half(const float x[16], const f16 expected[16]) {
    float *from = copy_of(x, 64);
    f16 *got = exactly(32);
    tested.to_f16(got, from, 16);
    for (int i = 0; i < 16; i++) check(got[i] == expected[i], "%a: %04x, not %04x", (double)x[i], got[i], expected[i]);
    free(got);
    free(from);
}

static void check_to_f16(void) {
    float x[16];
    f16 expected[16];
    for (int h = 0; h < 0x10000; h += 16) { /* every half is itself, NaNs made quiet */
        for (int i = 0; i < 16; i++) {
            x[i] = f16_to_f32((f16)(h + i));
            expected[i] = (f16)(h + i) | (isnan(x[i]) ? 0x200 : 0);
        }
        check_one_half(x, expected);
    }
    for (int h = 0; h < 0x7c00; h += 4) { /* half way between neighbours to the even one, and what lies beside */
        for (int i = 0; i < 16; i++) {
            int low = h + i / 4, high = low + 1;
            double next = high == 0x7c00 ? 65536.0 : (double)f16_to_f32((f16)high);
            float middle = (float)(((double)f16_to_f32((f16)low) + next) / 2);
            x[i] = i % 4 == 0 ? middle : i % 4 == 1 ? -middle : nextafterf(middle, i % 4 == 2 ? 0.0f : INFINITY);
            expected[i] = (f16)(i % 4 == 2 ? low : i % 4 == 3 ? high : low % 2 ? high : low);
            if (i % 4 == 1) expected[i] |= 0x8000;
        }
        check_one_half(x, expected);
    }
    static const float edges[16] = {65536.0f,   -65536.0f, FLT_MAX,   -FLT_MAX,    INFINITY, -INFINITY,
                                    FLT_MIN,    -FLT_MIN,  0x1p-149f, -0x1p-149f,  0x1p-25f, -0x1p-25f,
                                    0x1.8p-25f, 0x1p-24f,  0x1p-14f,  0x1.ffcp-15f};
    static const f16 halves[16] = {0x7c00, 0xfc00, 0x7c00, 0xfc00, 0x7c00, 0xfc00, 0,     0x8000,
                                   0,      0x8000, 0,      0x8000, 1,      1,      0x400, 0x400};
    check_one_half(edges, halves);
}

/* -- attention -------------------------------------------------------------------------------------------- */

/* Keys and values of a page's kv head, written by position and dimension (docs/formats.md, "KV pages"). */
typedef struct {
    int type, head_dim;
    f16 *f16s[2], *scales[2]; /* of keys and values */
    int8_t *q[2];
    uint8_t *bytes;
} kv_page;

static kv_page new_page(int type, int head_dim) {
    size_t n_bytes = phi3c_kv_bytes(type, head_dim), scale_bytes = (size_t)head_dim / 32 * PHI3C_TILE * sizeof(f16);
    kv_page page = {.type = type, .head_dim = head_dim, .bytes = exactly(n_bytes)};
    for (int v = 0; v < 2; v++) {
        uint8_t *half = page.bytes + (size_t)v * (n_bytes / 2);
        page.f16s[v] = page.scales[v] = (f16 *)half;
        page.q[v] = (int8_t *)(half + scale_bytes);
    }
    return page;
}

static int at_position(const kv_page *page, int v, int j, int d) {
    return v ? j * page->head_dim + d : d * PHI3C_TILE + j;
}

/* Of the 32 dimensions of d. */
static f16 *scale_of(const kv_page *page, int v, int j, int d) {
    return &page->scales[v][v ? j * (page->head_dim / 32) + d / 32 : d / 32 * PHI3C_TILE + j];
}

static double kv_value(const kv_page *page, int v, int j, int d) {
    int at = at_position(page, v, j, d);
    if (page->type == PHI3C_F16) return f16_to_f32(page->f16s[v][at]);
    return (double)f16_to_f32(*scale_of(page, v, j, d)) * page->q[v][at];
}

static void set_random(const kv_page *page, int v, int j, int d, float size) {
    float x[16] = {size * normal()};
    f16 halves[16];
    if (page->type == PHI3C_F16) {
        scalar.to_f16(halves, x, 16);
        page->f16s[v][at_position(page, v, j, d)] = halves[0];
    } else {
        x[0] = size * (1.0f + uniform()) / 80.0f;
        scalar.to_f16(halves, x, 16);
        if (d % 32 == 0) *scale_of(page, v, j, d) = halves[0];
        page->q[v][at_position(page, v, j, d)] = (int8_t)(below(255) - 127);
    }
}

static void set_poison(const kv_page *page, int v, int j, int d, f16 poison) {
    if (page->type == PHI3C_F16)
        page->f16s[v][at_position(page, v, j, d)] = poison;
    else
        *scale_of(page, v, j, d) = poison;
}

/* n queries over PAGES pages, each page masked to [first, last) of each query; what no query sees is NaN or infinite.
 */
static void check_attend(int type, int n, int head_dim, int masked) {
    enum { PAGES = 3, KEYS = PAGES * PHI3C_TILE };
    size_t rows = (size_t)n * 4;
    float *max[2], *sum[2], *o[2], *q = exactly(rows * (size_t)head_dim);
    kv_page page[PAGES];
    int *first[PAGES], *last[PAGES];
    for (int s = 0; s < 2; s++) {
        max[s] = exactly(rows), sum[s] = exactly(rows), o[s] = exactly(rows * (size_t)head_dim);
        memset(sum[s], 0, rows);
        memset(o[s], 0, rows * (size_t)head_dim);
        for (int i = 0; i < n; i++) max[s][i] = -INFINITY;
    }
    for (int i = 0; i < n * head_dim; i++) q[i] = normal() / sqrtf((float)head_dim);
    for (int p = 0; p < PAGES; p++) {
        page[p] = new_page(type, head_dim);
        first[p] = exactly((size_t)n * sizeof(int)), last[p] = exactly((size_t)n * sizeof(int));
        for (int j = 0; j < PHI3C_TILE; j++)
            for (int d = 0; d < head_dim; d++) set_random(&page[p], 0, j, d, 3.0f), set_random(&page[p], 1, j, d, 1.0f);
        for (int i = 0; i < n; i++) {
            first[p][i] = masked == 0 ? 0 : masked == 1 ? below(2) * i : below(PHI3C_TILE);
            last[p][i] = masked == 0 ? PHI3C_TILE : first[p][i] + 1 + below(PHI3C_TILE - first[p][i]);
            if (masked == 1) last[p][i] = PHI3C_TILE - n + i + 1; /* causal */
            if (masked == 3) first[p][i] = first[p][0], last[p][i] = last[p][0];
        }
        for (int j = 0; masked && j < PHI3C_TILE; j++) { /* seen by at most one: poison for every other */
            int seen = 0;
            for (int i = 0; i < n; i++) seen += j >= first[p][i] && j < last[p][i];
            for (int d = 0; !seen && d < head_dim; d++) {
                set_poison(&page[p], 0, j, d, 0x7e00);
                set_poison(&page[p], 1, j, d, 0x7c00);
            }
        }
    }
    for (int p = 0; p < PAGES; p++) {
        const uint8_t *kv = page[p].bytes, *next = page[p < PAGES - 1 ? p + 1 : p].bytes;
        scalar.attend_tile[type](max[0], sum[0], o[0], q, kv, next, first[p], last[p], n, head_dim);
        tested.attend_tile[type](max[1], sum[1], o[1], q, kv, next, first[p], last[p], n, head_dim);
        check(all_same(max[1], max[0], n) && all_same(sum[1], sum[0], n) && all_same(o[1], o[0], n * head_dim),
              "type %d, head_dim %d, %d queries, mask %d, page %d", type, head_dim, n, masked, p);
    }
    digest_floats(sum[1], n);
    digest_floats(o[1], n * head_dim);
    for (int i = 0; i < n; i++) {
        double score[KEYS], largest = -INFINITY, total = 0, slack = 0;
        for (int key = 0; key < KEYS; key++) {
            int p = key / PHI3C_TILE, j = key % PHI3C_TILE;
            double size = 0;
            score[key] = 0;
            for (int d = 0; d < head_dim; d++) {
                double product = (double)q[i * head_dim + d] * kv_value(&page[p], 0, j, d);
                score[key] += product;
                size += fabs(product);
            }
            if (j < first[p][i] || j >= last[p][i]) {
                score[key] = -INFINITY;
                continue;
            }
            largest = fmax(largest, score[key]);
            slack = fmax(slack, size);
        }
        for (int key = 0; key < KEYS; key++) total += score[key] = exp(score[key] - largest);
        /* a weight is off by its score's error (a chain of head_dim roundings, and the rounded difference), by 2 EPS of
         * exp, and so is the total; then a chain over the keys, and the rescaling of each page */
        double tolerance = (2 * ((head_dim + 1) * slack + 2) + 2 * KEYS + 4 * PAGES) * EPS;
        for (int d = 0; d < head_dim; d++) {
            double y = 0, size = 0;
            for (int key = 0; key < KEYS; key++) {
                if (score[key] == 0) continue;
                double term = score[key] * kv_value(&page[key / PHI3C_TILE], 1, key % PHI3C_TILE, d);
                y += term;
                size += fabs(term);
            }
            double got = (double)o[1][i * head_dim + d] / sum[1][i];
            check(fabs(got - y / total) <= tolerance * size / total, "head_dim %d: %g, not %g", head_dim, got,
                  y / total);
        }
    }
    for (int p = 0; p < PAGES; p++) free(page[p].bytes), free(first[p]), free(last[p]);
    for (int s = 0; s < 2; s++) free(max[s]), free(sum[s]), free(o[s]);
    free(q);
}

/* Scores that are NaN, infinite, or too far below the largest for their weight to be more than 0: as scalar. */
static void check_wild_scores(int type, int n) {
    enum { HEAD_DIM = 96 };
    const uint32_t nan_bits = 0x7fc00155; /* whose low bits a shift would bring into the exponent */
    float odd_nan, max[2][PHI3C_QUERIES], sum[2][PHI3C_QUERIES], o[2][PHI3C_QUERIES * HEAD_DIM] = {0};
    float q[PHI3C_QUERIES * HEAD_DIM];
    int first[PHI3C_QUERIES], last[PHI3C_QUERIES];
    memcpy(&odd_nan, &nan_bits, 4);
    kv_page page = new_page(type, HEAD_DIM);
    for (int j = 0; j < PHI3C_TILE; j++)
        for (int d = 0; d < HEAD_DIM; d++) set_random(&page, 0, j, d, 3.0f), set_random(&page, 1, j, d, 1.0f);
    for (int i = 0; i < n; i++) {
        const float wild[] = {odd_nan, INFINITY, 1e30f, 20.0f, 1.0f};
        for (int d = 0; d < HEAD_DIM; d++) q[i * HEAD_DIM + d] = normal();
        q[i * HEAD_DIM + below(HEAD_DIM)] *= wild[i % 5];
        max[0][i] = max[1][i] = -INFINITY, sum[0][i] = sum[1][i] = 0.0f;
        first[i] = i % 3, last[i] = PHI3C_TILE - i % 4;
    }
    for (int step = 0; step < 2; step++) { /* then with a NaN among the keys */
        if (step == 1) set_poison(&page, 0, 40, 5, 0x7e01);
        scalar.attend_tile[type](max[0], sum[0], o[0], q, page.bytes, page.bytes, first, last, n, HEAD_DIM);
        tested.attend_tile[type](max[1], sum[1], o[1], q, page.bytes, page.bytes, first, last, n, HEAD_DIM);
        check(all_same(max[1], max[0], n) && all_same(sum[1], sum[0], n) && all_same(o[1], o[0], n * HEAD_DIM),
              "type %d, %d queries, step %d: wild scores", type, n, step);
        for (int i = 0; i < n; i += step ? 1 : 5)
            check(isnan(sum[0][i]) && isnan(sum[1][i]), "a NaN of a query or key is one of the sum");
    }
    free(page.bytes);
}

/* -- operations on a pool --------------------------------------------------------------------------------- */

static const int pool_sizes[] = {1, 2, 3, 5};

static phi3c_pool *new_pool(int n_threads) {
    phi3c_pool *pool = phi3c_pool_new(n_threads);
    if (!pool) exit(2);
    return pool;
}

static phi3c_activation new_activation(int64_t n, int64_t columns) {
    return (phi3c_activation){exactly((size_t)(n * columns) * 4), exactly((size_t)n * phi3c_x8_bytes(columns)),
                              exactly(phi3c_outlier_bytes(n, columns)), columns};
}

static uint8_t *row_of(phi3c_activation a, int64_t row) { return a.x8 + (size_t)row * phi3c_x8_bytes(a.columns); }

static int same_activation(phi3c_activation a, phi3c_activation b, int64_t n) {
    int same = all_same(a.f32, b.f32, n * a.columns);
    for (int64_t i = 0; i < n; i++) same &= same_rows(row_of(a, i), row_of(b, i), a.columns);
    return same;
}

static void free_activation(phi3c_activation a) {
    free(a.f32);
    free(a.x8);
    free(a.outliers);
}

/* Segments of several types, in panels that are not full, against one call of the scalar tile a panel. */
static void check_matmul(void) {
    static const int segment_types[] = {10, 12, 1, 7}, segment_rows[] = {37, 20, 5, 16}; /* indices of `types` */
    enum { SEGMENTS = 4, ROWS = 37 + 20 + 5 + 16, COLUMNS = 512, MAX_N = 540 };
    phi3c_pool *one = new_pool(1);
    phi3c_segment segments[SEGMENTS];
    for (int s = 0; s < SEGMENTS; s++) {
        int t = segment_types[s], type = types[t].type;
        size_t n_bytes = row_bytes(type, COLUMNS);
        uint8_t *src = exactly((size_t)segment_rows[s] * n_bytes),
                *panels = exactly(phi3c_packed_bytes(type, segment_rows[s], COLUMNS));
        for (int r = 0; r < segment_rows[s]; r++) random_row(src + (size_t)r * n_bytes, t, COLUMNS, 0);
        phi3c_pack(panels, src, type, segment_rows[s], COLUMNS, NULL, one);
        segments[s] = (phi3c_segment){type, segment_rows[s], panels};
        free(src);
    }
    /* up to 7 are not sorted, up to 48 share a list, or more where panels are multiplied in pairs; 288 are multiplied
     * by slices of columns, 540 in two shares */
    static const int batches[] = {1, 7, 8, 48, 53, 57, 288, MAX_N};
    for (int b = 0; b < 8; b++) {
        int n = batches[b];
        phi3c_activation x = new_activation(n, COLUMNS);
        for (int i = 0; i < n; i++) random_activation(x.f32 + i * COLUMNS, COLUMNS, i % USUAL_KINDS);
        phi3c_quantize(x, n, one);
        float *expected = exactly((size_t)n * ROWS * 4), *start = exactly((size_t)n * ROWS * 4);
        for (int i = 0; i < n * ROWS; i++) start[i] = normal();
        for (int s = 0, row = 0; s < SEGMENTS; row += segment_rows[s++])
            for (int r = 0; r < segment_rows[s]; r += 16) {
                float tile[MAX_N * 16];
                int type = segments[s].type;
                const uint8_t *panel = segments[s].panels + phi3c_packed_bytes(type, r, COLUMNS);
                scalar.tile[type](tile, panel, is_float(type) ? (uint8_t *)x.f32 : x.x8,
                                  is_float(type) ? COLUMNS * 4 : phi3c_x8_bytes(COLUMNS), n, COLUMNS, NULL);
                for (int i = 0; i < n; i++)
                    for (int l = 0; l < 16 && r + l < segment_rows[s]; l++)
                        expected[i * ROWS + row + r + l] = tile[i * 16 + l];
            }
        for (int p = 0; p < 4; p++) {
            phi3c_pool *pool = new_pool(pool_sizes[p]);
            float *out = exactly((size_t)n * ROWS * 4);
            phi3c_matmul(out, segments, SEGMENTS, x, n, 0, pool);
            check(all_same(out, expected, n * ROWS), "%d tokens, %d threads", n, pool_sizes[p]);
            memcpy(out, start, (size_t)n * ROWS * 4);
            phi3c_matmul(out, segments, SEGMENTS, x, n, 1, pool);
            int ok = 1;
            for (int i = 0; i < n * ROWS; i++) ok &= same(out[i], start[i] + expected[i]);
            check(ok, "%d tokens added, %d threads", n, pool_sizes[p]);
            free(out);
            phi3c_pool_free(pool);
        }
        free(start);
        free(expected);
        free_activation(x);
    }
    for (int s = 0; s < SEGMENTS; s++) free((void *)segments[s].panels);
    phi3c_pool_free(one);
}

/* Gate and up, in one segment or in two of different types, against phi3c_matmul and the scalar row kernel. */
static void check_gate_up(int n_segments) {
    static const int segment_types[] = {10, 1};     /* indices of `types` */
    enum { FFN = 352, COLUMNS = 512, MAX_N = 540 }; /* 22 panels */
    phi3c_pool *one = new_pool(1);
    phi3c_segment segments[2];
    int rows = 2 * FFN / n_segments;
    for (int s = 0; s < n_segments; s++) {
        int t = segment_types[s], type = types[t].type;
        size_t n_bytes = row_bytes(type, COLUMNS);
        uint8_t *src = exactly((size_t)rows * n_bytes), *panels = exactly(phi3c_packed_bytes(type, rows, COLUMNS));
        for (int r = 0; r < rows; r++) random_row(src + (size_t)r * n_bytes, t, COLUMNS, 0);
        phi3c_pack(panels, src, type, rows, COLUMNS, NULL, one);
        segments[s] = (phi3c_segment){type, rows, panels};
        free(src);
    }
    static const int batches[] = {1, 7, 48, 57, MAX_N};
    for (int b = 0; b < 5; b++) {
        int n = batches[b];
        phi3c_activation x = new_activation(n, COLUMNS), expected = new_activation(n, FFN);
        for (int i = 0; i < n; i++) random_activation(x.f32 + i * COLUMNS, COLUMNS, i % USUAL_KINDS);
        phi3c_quantize(x, n, one);
        float *products = exactly((size_t)n * 2 * FFN * 4);
        phi3c_matmul(products, segments, n_segments, x, n, 0, one);
        for (int i = 0; i < n; i++) {
            float *y = expected.f32 + i * FFN, *gate = products + 2 * i * FFN;
            scalar.silu_mul_row(y, gate, gate + FFN, FFN);
            quantised(&scalar, row_of(expected, i), y, FFN);
        }
        for (int p = 0; p < 4; p++) {
            phi3c_pool *pool = new_pool(pool_sizes[p]);
            phi3c_activation out = new_activation(n, FFN);
            phi3c_gate_up(out, segments, n_segments, x, n, pool);
            check(same_activation(out, expected, n), "%d tokens, %d segments, %d threads", n, n_segments,
                  pool_sizes[p]);
            free_activation(out);
            phi3c_pool_free(pool);
        }
        free(products);
        free_activation(expected);
        free_activation(x);
    }
    for (int s = 0; s < n_segments; s++) free((void *)segments[s].panels);
    phi3c_pool_free(one);
}

/* A token behind many and some behind fewer, shared out among threads, against the scalar tile for one query a time. */
static void check_attention(int window) {
    enum { GROUP = 4, KV = 3, HEAD_DIM = 32, PAGES = 12, ROWS = 21 };
    static const phi3c_span spans[] = {{0, 0, 1, 700, 0}, {1, 1, 20, 500, 0}};
    static const int threads[] = {1, 2, 3, 4, 5, 7, 8, 16};
    enum { COLUMNS = GROUP * KV * HEAD_DIM, QKV = (GROUP + 2) * KV * HEAD_DIM };
    size_t kv_bytes = phi3c_kv_bytes(PHI3C_F16, HEAD_DIM);
    uint8_t *pages[2 * PAGES];
    int32_t table[2 * PAGES];
    for (int i = 0; i < 2 * PAGES; i++) {
        pages[i] = exactly(KV * kv_bytes);
        table[i] = 2 * PAGES - 1 - i;
        for (size_t j = 0; j < KV * kv_bytes / 32; j++) {
            float x[16];
            for (int l = 0; l < 16; l++) x[l] = normal();
            scalar.to_f16((f16 *)pages[i] + 16 * j, x, 16);
        }
    }
    phi3c_attention a = {GROUP * KV, KV, HEAD_DIM, HEAD_DIM, window, PHI3C_F16, 0, pages, table, PAGES};
    float *qkv = exactly(ROWS * QKV * 4);
    for (int i = 0; i < ROWS * QKV; i++) qkv[i] = normal();
    phi3c_activation expected = new_activation(ROWS, COLUMNS);
    for (int s = 0; s < 2; s++)
        for (int i = 0; i < spans[s].n * GROUP * KV; i++) {
            int row = spans[s].row + i / (GROUP * KV), head = i % (GROUP * KV),
                position = spans[s].position + i / (GROUP * KV);
            int low = window && position >= window ? position - window + 1 : 0;
            float max = -INFINITY, sum = 0.0f, o[HEAD_DIM] = {0};
            for (int p = low / PHI3C_TILE; p <= position / PHI3C_TILE; p++) {
                const uint8_t *kv = pages[table[s * PAGES + p]] + (size_t)(head / GROUP) * kv_bytes;
                int first = low > p * PHI3C_TILE ? low - p * PHI3C_TILE : 0, last = position + 1 - p * PHI3C_TILE;
                if (last > PHI3C_TILE) last = PHI3C_TILE;
                scalar.attend_tile[PHI3C_F16](&max, &sum, o, qkv + row * QKV + head * HEAD_DIM, kv, kv, &first, &last,
                                              1, HEAD_DIM);
            }
            for (int d = 0; d < HEAD_DIM; d++) expected.f32[row * COLUMNS + head * HEAD_DIM + d] = o[d] / sum;
        }
    phi3c_pool *one = new_pool(1);
    phi3c_quantize(expected, ROWS, one);
    phi3c_pool_free(one);
    for (int t = 0; t < 8; t++)
        for (int n_spans = 1; n_spans <= 2; n_spans++) {
            phi3c_pool *pool = new_pool(threads[t]);
            phi3c_activation out = new_activation(ROWS, COLUMNS);
            phi3c_attend(out, &a, qkv, spans, n_spans, pool);
            check(same_activation(out, expected, n_spans == 1 ? 1 : ROWS), "window %d, %d spans, %d threads", window,
                  n_spans, threads[t]);
            free_activation(out);
            phi3c_pool_free(pool);
        }
    free_activation(expected);
    free(qkv);
    for (int i = 0; i < 2 * PAGES; i++) free(pages[i]);
}

/* The operations that spread rows over a pool give what the row kernels give. */
static void check_rows(void) {
    enum { N = 9, COLUMNS = 576 };
    float *x = exactly(N * COLUMNS * 4), *weight = exactly(COLUMNS * 4);
    random_activation(x, N * COLUMNS, 0);
    random_activation(weight, COLUMNS, 0);
    phi3c_activation normed = new_activation(N, COLUMNS);
    for (int i = 0; i < N; i++) {
        float *y = normed.f32 + i * COLUMNS;
        scalar.rms_norm_row(y, x + i * COLUMNS, weight, 1e-6f, COLUMNS);
        quantised(&scalar, row_of(normed, i), y, COLUMNS);
    }
    for (int p = 0; p < 4; p++) {
        phi3c_pool *pool = new_pool(pool_sizes[p]);
        phi3c_activation out = new_activation(N, COLUMNS);
        phi3c_rms_norm(out, x, weight, 1e-6f, N, pool);
        check(same_activation(out, normed, N), "rms_norm, %d threads", pool_sizes[p]);
        memset(out.x8, 0xff, N * phi3c_x8_bytes(COLUMNS));
        phi3c_quantize(out, N, pool);
        check(same_activation(out, normed, N), "quantize, %d threads", pool_sizes[p]);
        free_activation(out);
        phi3c_pool_free(pool);
    }
    free_activation(normed);
    free(weight);
    free(x);
}

static void count_items(void *arg, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) word_add((atomic_word *)arg + i, 1);
}

/* Every item of every job runs once, on more threads than there are cores. */
static void check_pool(int n_threads, int jobs) {
    enum { MOST = 40 };
    phi3c_pool *pool = new_pool(n_threads);
    check(phi3c_pool_size(pool) == n_threads, "size");
    for (int job = 0; job < jobs; job++) {
        atomic_word done[MOST] = {{0}};
        int n = below(MOST + 1), ok = 1;
        phi3c_pool_run(pool, count_items, done, n, 1 + below(4));
        for (int i = 0; i < MOST; i++) ok &= word_load(&done[i]) == (i < n);
        check(ok, "%d threads, job %d", n_threads, job);
    }
    phi3c_pool_free(pool);
}

/* -- limits ----------------------------------------------------------------------------------------------- */

static void check_limits(void) {
    static const size_t lines[] = {1, 4096, 4097, 3 * 4096};
    phi3c_pool *pool = new_pool(2);
    for (int i = 0; i < 4; i++) {
        size_t n = lines[i] * 16;
        uint32_t *words = exactly(n * 4), expected = 0;
        for (size_t j = 0; j < n; j++) expected ^= words[j] = (uint32_t)random64();
        check(phi3c_read((const uint8_t *)words, n * 4, pool) == expected, "%zu words", n);
        free(words);
    }
    int64_t burst = tested.peak ? tested.peak() : 0;
    check(burst % (32 * PEAK_ROUNDS) == 0 && (burst > 0) == (tested.peak != NULL), "a burst of %lld", (long long)burst);
    check(phi3c_peak(3, pool) == 3 * burst, "3 bursts");
    phi3c_pool_free(pool);
}

/* -- all of it -------------------------------------------------------------------------------------------- */

static void check_isa(const char *isa) {
    static const int64_t widths[] = {32, 96, 256, 576, 512, 768};
    static const int head_dims[] = {16, 32, 48, 64, 80, 96, 128, 272};
    static const int queries[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 29, PHI3C_QUERIES};
    phi3c_init(isa);
    tested = phi3c_kernel;
    state = 1; /* every instruction set is given the same */
    candidates = 0;
    digest = 0xcbf29ce484222325u;
    phi3c_pool *pool = new_pool(1);
    for (int t = 0; t < N_TYPES; t++) {
        char operation[32];
        for (int w = 0; w < 6; w++)
            for (int round = 0; runs_on(types[t].type, widths[w]) && round < ROW_KINDS; round++)
                if (!left_out()) check_tile(t, widths[w], round, pool);
        snprintf(operation, sizeof operation, "tile %s", types[t].name);
        report(isa, operation);
    }
    check_quantize();
    report(isa, "quantize_row");
    check_rms_norm();
    report(isa, "rms_norm_row");
    check_silu_mul();
    report(isa, "silu_mul_row");
    check_to_f16();
    report(isa, "to_f16");
    for (int h = 0; h < 8; h++)
        for (int i = 0; i < 13; i++)
            for (int masked = 0; masked < 4; masked++)
                if (!left_out()) check_attend(PHI3C_F16, queries[i], head_dims[h], masked);
    for (int i = 0; i < 13; i++)
        if (queries[i] <= PHI3C_QUERIES) check_wild_scores(PHI3C_F16, queries[i]);
    report(isa, "attend_tile f16");
    for (int h = 0; h < 8; h++)
        for (int i = 0; phi3c_kv_bytes(PHI3C_Q8_0, head_dims[h]) && i < 13; i++)
            for (int masked = 0; masked < 4; masked++)
                if (!left_out()) check_attend(PHI3C_Q8_0, queries[i], head_dims[h], masked);
    for (int i = 0; i < 13; i++)
        if (queries[i] <= PHI3C_QUERIES) check_wild_scores(PHI3C_Q8_0, queries[i]);
    report(isa, "attend_tile q8_0");
    check_matmul();
    report(isa, "phi3c_matmul");
    check_gate_up(1);
    check_gate_up(2);
    report(isa, "phi3c_gate_up");
    check_attention(0);
    check_attention(600);
    report(isa, "phi3c_attend");
    check_rows();
    report(isa, "rows over a pool");
    check_limits();
    report(isa, "limits");
    phi3c_pool_free(pool);
}

int main(int argc, char **argv) {
    if (argc > 1) share = atoi(argv[1]);
    if (argc > 2 || share < 1) {
        fprintf(stderr, "usage: %s [N]\n", argv[0]);
        return 2;
    }
    phi3c_init("scalar");
    scalar = phi3c_kernel;
    phi3c_pool *pool = new_pool(2);
    for (int t = 0; t < N_TYPES; t++)
        for (int64_t columns = 32; columns <= 768; columns += 32)
            if (runs_on(types[t].type, columns)) check_pack(t, columns, pool);
    report("pack", "there and back");
    phi3c_pool *one = new_pool(1), *three = new_pool(3);
    for (int t = 0; t < N_TYPES; t++)
        for (int64_t columns = 32; columns <= 288; columns += 32)
            if (phi3c_has_encoder(types[t].type) && runs_on(types[t].type, columns))
                check_encode(t, columns, one, three);
    phi3c_pool_free(three);
    phi3c_pool_free(one);
    phi3c_pool_free(pool);
    report("encode", "near, and threads");
    check_pool(2, 10000);
    check_pool(8, 10000);
    report("pool", "every item once");
    for (int i = 0; phi3c_available_isa(i); i++) {
        check_isa(phi3c_available_isa(i));
        printf("%-7s digest %016llx\n", phi3c_available_isa(i), (unsigned long long)digest);
    }
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed != 0;
}
