/* SPDX-License-Identifier: MIT */
/* Packed weights times activations. */
#include <assert.h>

#include "kernels.h"
#include "pool.h"

/* Tokens between two walks over a panel: of TOKENS, a panel's activations stay in L2 (48 * 12 * 320 bytes at 3072
 * columns), of AT_ONCE those that two panels at once need for a slice of columns. */
enum { TOKENS = PHI3C_TOKENS, AT_ONCE = 11 * TOKENS };
enum { SORTED = 8 };   /* so many pay for sorting their outliers: 8 sequences take 0.98 of the time */
enum { TOGETHER = 8 }; /* panels that are multiplied before their products are stored */

typedef struct {
    float *out;
    const phi3c_segment *segments;
    int64_t n_rows; /* of all segments */
    phi3c_activation x;
    int64_t n, at_once;
    enum into { PUT, ADD, SILU_MUL } into; /* out = result, out += result, out = silu(out) * result */
} matmul_job;

static int64_t panels_of(const phi3c_segment *segment) { return (segment->rows + PHI3C_PANEL - 1) / PHI3C_PANEL; }

/* Tokens between two walks of n over panels of a type: even shares, of whole TOKENS. */
static int64_t tokens_at_once(int type, int64_t n) {
    int64_t shares = (n + AT_ONCE - 1) / AT_ONCE;
    return phi3c_kernel.pair[type] ? (n + shares * TOKENS - 1) / (shares * TOKENS) * TOKENS : TOKENS;
}

/* Panels of a segment, and where their products with n tokens go: tile[i][t][r] = row 16 (panel + i) + r of the segment
 * times token t. */
typedef struct {
    const phi3c_segment *segment;
    int64_t panel, n_panels;
    float *tile;
} panel_run;

/* How many panels of a run are multiplied two at a time. */
static int64_t paired(const panel_run *run, int n) {
    return phi3c_kernel.pair[run->segment->type] && n >= SORTED ? run->n_panels / 2 * 2 : 0;
}

/* The lists of the rows that are multiplied from row `from` on. */
static outlier_list *lists_from(phi3c_activation x, int64_t from) {
    return (outlier_list *)(x.outliers + (size_t)(from / TOKENS * supers_of(x.columns)) * list_bytes(TOKENS));
}

/* tile += those panels times super-blocks [super, super + step) of n tokens from `from` on. */
static void multiply_pairs(const panel_run *run, phi3c_activation x, int64_t from, int n, int64_t super, int64_t step) {
    int type = run->segment->type;
    size_t bytes = phi3c_packed_bytes(type, PHI3C_PANEL, x.columns), stride = phi3c_x8_bytes(x.columns);
    int64_t first = super * PHI3C_SUPER, left = x.columns - first;
    const uint8_t *slice =
        run->segment->panels + (size_t)run->panel * bytes + phi3c_packed_bytes(type, PHI3C_PANEL, first);
    const uint8_t *rows = x.x8 + (size_t)from * stride + (size_t)super * sizeof(block_x8);
    const outlier_list *lists = list_at(lists_from(x, from), super, n);
    for (int64_t i = 0; i < paired(run, n); i += 2)
        phi3c_kernel.pair[type](run->tile + i * n * PHI3C_PANEL, slice + (size_t)i * bytes, bytes, rows, stride, n,
                                left < step * PHI3C_SUPER ? left : step * PHI3C_SUPER, lists);
}

/* The other panels of a run times n tokens. */
static void multiply_singles(const panel_run *run, phi3c_activation x, int64_t from, int n) {
    int type = run->segment->type, is_float = type <= PHI3C_F16 || type == PHI3C_BF16;
    size_t bytes = phi3c_packed_bytes(type, PHI3C_PANEL, x.columns);
    size_t stride = is_float ? (size_t)x.columns * 4 : phi3c_x8_bytes(x.columns);
    const uint8_t *rows = (is_float ? (const uint8_t *)x.f32 : x.x8) + (size_t)from * stride;
    for (int64_t i = paired(run, n); i < run->n_panels; i++)
        for (int t = 0; t < n; t += TOKENS) {
            int some = n - t < TOKENS ? n - t : TOKENS, listed = !is_float && n <= TOKENS && n >= SORTED;
            phi3c_kernel.tile[type](run->tile + (i * n + t) * PHI3C_PANEL,
                                    run->segment->panels + (size_t)(run->panel + i) * bytes, rows + (size_t)t * stride,
                                    stride, some, x.columns, listed ? lists_from(x, from) : NULL);
        }
}

/* The tiles of some runs of panels, for tokens [from, to): a slice of columns of all panels, then the next slice, which
 * has up to SLICE blocks of activations. They come from the last cache to L2 once for all panels: 8 in place of 4 are
 * 1.02 of the speed. */
static void multiply_panels(const panel_run *runs, int n_runs, phi3c_activation x, int64_t from, int64_t to) {
    enum { SLICE = 512 };
    int n = (int)(to - from);
    int64_t step = n < SLICE ? SLICE / n : 1;
    for (int i = 0; i < n_runs; i++)
        memset(runs[i].tile, 0, (size_t)paired(&runs[i], n) * (size_t)n * PHI3C_PANEL * sizeof(float));
    for (int64_t super = 0; super < supers_of(x.columns); super += step)
        for (int i = 0; i < n_runs; i++) multiply_pairs(&runs[i], x, from, n, super, step);
    for (int i = 0; i < n_runs; i++) multiply_singles(&runs[i], x, from, n);
}

/* -- outliers --------------------------------------------------------------------------------------------- */

typedef struct {
    phi3c_activation x;
    int64_t n, at_once;
} sort_job;

/* Of n rows, `stride` bytes apart, by counting. */
static void sort_outliers(outlier_list *list, const outliers_x8 *first, size_t stride, int n) {
    uint16_t end[256] = {0}; /* of a column, in the list */
    list->n = 0;
    for (int row = 0; row < n; row++) {
        const outliers_x8 *outliers = outliers_at(first, stride, row);
        for (int i = 0; i < outliers->n; i++) end[outliers->column[i]]++;
        list->n += outliers->n;
    }
    if (!list->n) return;
    for (int column = 1; column < 256; column++) end[column] = (uint16_t)(end[column] + end[column - 1]);
    for (int row = n - 1; row >= 0; row--) {
        const outliers_x8 *outliers = outliers_at(first, stride, row);
        for (int i = 0; i < outliers->n; i++) {
            uint8_t column = outliers->column[i];
            uint32_t at = --end[column];
            list->outliers[at].x = outliers->x[i];
            list->outliers[at].column = column;
            list->outliers[at].row = (uint16_t)row;
        }
    }
}

/* Items are super-blocks of rows that are multiplied at once: the longer a list, the more outliers share a column. */
static void sort_items(void *arg, int64_t first, int64_t last) {
    const sort_job *job = arg;
    int64_t supers = supers_of(job->x.columns);
    size_t stride = phi3c_x8_bytes(job->x.columns);
    for (int64_t item = first; item < last; item++) {
        int64_t from = item / supers * job->at_once, left = job->n - from,
                n = left < job->at_once ? left : job->at_once;
        const outliers_x8 *of_first = outliers_of(job->x.x8 + (size_t)from * stride, job->x.columns) + item % supers;
        sort_outliers((outlier_list *)list_at(lists_from(job->x, from), item % supers, n), of_first, stride, (int)n);
    }
}

/* Before n rows are multiplied with any number of panels. */
static void sort_all(phi3c_activation x, int64_t n, int64_t at_once, phi3c_pool *pool) {
    sort_job job = {x, n, at_once};
    int64_t shares = (n + at_once - 1) / at_once;
    if (n >= SORTED) phi3c_pool_run(pool, sort_items, &job, shares * supers_of(x.columns), 1);
}

/* -- rows of panels --------------------------------------------------------------------------------------- */

enum { ROWS_AHEAD = 8 };

/* Where products of a token will be stored, up to `end`: these rows lie far apart, so that nothing else fetches them,
 * and what is fetched before all tokens are multiplied is gone when they have been. 1.01 to 1.03 of a matrix. */
static void fetch_row(const float *out, int64_t stride, int64_t n_panels, int64_t t, int64_t end) {
    for (int64_t i = 0; t < end && i < n_panels; i++) prefetch(out + t * stride + i * PHI3C_PANEL);
}

/* Into the output: the rows of a panel for a token. */
static inline void store(float *restrict out, const float *restrict result, int64_t rows, enum into into) {
    switch (into) {
    case PUT: memcpy(out, result, (size_t)rows * 4); break;
    case ADD:
        for (int64_t r = 0; r < rows; r++) out[r] += result[r];
        break;
    case SILU_MUL: phi3c_kernel.silu_mul_row(out, out, result, rows);
    }
}

/* Panels for tokens [from, to), into the output from column `column` on. */
static void multiply_into(const matmul_job *job, const phi3c_segment *segment, int64_t panel, int64_t n_panels,
                          int64_t column, int64_t from, int64_t to) {
    _Alignas(64) float tile[TOGETHER * AT_ONCE * PHI3C_PANEL];
    int64_t last_rows = segment->rows - (panel + n_panels - 1) * PHI3C_PANEL;
    if (last_rows > PHI3C_PANEL) last_rows = PHI3C_PANEL;
    for (int64_t t = from; t < from + ROWS_AHEAD; t++) fetch_row(job->out + column, job->n_rows, n_panels, t, to);
    multiply_panels(&(panel_run){segment, panel, n_panels, tile}, 1, job->x, from, to);
    for (int64_t t = from; t < to; t++) {
        fetch_row(job->out + column, job->n_rows, n_panels, t + ROWS_AHEAD, to);
        float *out = job->out + t * job->n_rows + column;
        const float *result = tile + (t - from) * PHI3C_PANEL;
        for (int64_t i = 1; i < n_panels; i++, out += PHI3C_PANEL, result += (to - from) * PHI3C_PANEL)
            store(out, result, PHI3C_PANEL, job->into);
        store(out, result, last_rows, job->into);
    }
}

static void multiply(void *arg, int64_t first, int64_t last) {
    const matmul_job *job = arg;
    for (int64_t from = 0; from < job->n; from += job->at_once) {
        int64_t to = from + job->at_once < job->n ? from + job->at_once : job->n;
        const phi3c_segment *segment = job->segments;
        int64_t row = 0, base = 0, n; /* of the segment: first output row, first panel */
        for (int64_t item = first; item < last; item += n) {
            for (; item - base >= panels_of(segment); segment++) {
                base += panels_of(segment);
                row += segment->rows;
            }
            int64_t end = base + panels_of(segment) < last ? base + panels_of(segment) : last;
            n = end - item < TOGETHER ? end - item : TOGETHER;
            multiply_into(job, segment, item - base, n, row + (item - base) * PHI3C_PANEL, from, to);
        }
    }
}

/* Panels of a chunk: few enough to share evenly, enough, up to `most`, to be one long stream; for so many tokens that
 * panels may be multiplied two at a time, in twos, on however many threads. */
static int64_t grain(int64_t n_panels, int64_t most, int64_t n, phi3c_pool *pool) {
    int64_t least = n < SORTED ? 1 : 2, even = n_panels / (8 * phi3c_pool_size(pool)) / least * least;
    return even < least ? least : even > most ? most : even;
}

static void run(float *out, const phi3c_segment *segments, int n_segments, phi3c_activation x, int64_t n,
                enum into into, phi3c_pool *pool) {
    matmul_job job = {out, segments, 0, x, n, tokens_at_once(segments->type, n), into};
    int64_t n_panels = 0;
    for (int i = 0; i < n_segments; i++) {
        assert(phi3c_kernel.tile[segments[i].type]);
        job.n_rows += segments[i].rows;
        n_panels += panels_of(&segments[i]);
    }
    phi3c_pool_run(pool, multiply, &job, n_panels, grain(n_panels, TOGETHER, n, pool));
}

void phi3c_matmul(float *out, const phi3c_segment *segments, int n_segments, phi3c_activation x, int64_t n, int add,
                  phi3c_pool *pool) {
    sort_all(x, n, tokens_at_once(segments->type, n), pool);
    run(out, segments, n_segments, x, n, add ? ADD : PUT, pool);
}

/* -- gate and up ------------------------------------------------------------------------------------------ */

enum { PAIRS = TOGETHER / 2 }; /* panels of gate, and as many of up, whose tiles stay in L2 */

typedef struct {
    phi3c_activation out;
    const phi3c_segment *gate, *up;
    phi3c_activation x;
    int64_t n, at_once;
} gate_up_job;

/* Items are panels of gate, each with the panel of up that it is multiplied with, while their tiles are in L2. */
static void gate_up(void *arg, int64_t first, int64_t last) {
    const gate_up_job *job = arg;
    _Alignas(64) float gate[PAIRS * AT_ONCE * PHI3C_PANEL], up[PAIRS * AT_ONCE * PHI3C_PANEL];
    for (int64_t from = 0; from < job->n; from += job->at_once) {
        int64_t to = from + job->at_once < job->n ? from + job->at_once : job->n, tile = (to - from) * PHI3C_PANEL;
        for (int64_t panel = first; panel < last; panel += PAIRS) {
            int64_t n = last - panel < PAIRS ? last - panel : PAIRS;
            panel_run runs[2] = {{job->gate, panel, n, gate}, {job->up, panel, n, up}};
            multiply_panels(runs, 2, job->x, from, to);
            float *column = job->out.f32 + panel * PHI3C_PANEL;
            for (int64_t t = from; t < from + ROWS_AHEAD; t++) fetch_row(column, job->out.columns, n, t, to);
            phi3c_kernel.silu_mul_row(gate, gate, up, n * tile);
            for (int64_t t = from; t < to; t++) {
                fetch_row(column, job->out.columns, n, t + ROWS_AHEAD, to);
                for (int64_t i = 0; i < n; i++)
                    memcpy(column + t * job->out.columns + i * PHI3C_PANEL, gate + i * tile + (t - from) * PHI3C_PANEL,
                           PHI3C_PANEL * 4);
            }
        }
    }
}

/* Few tokens wait for memory, and a panel of up between two of gate interrupts the stream: 0.95 of the speed with one.
 * They have all of gate written first. */
void phi3c_gate_up(phi3c_activation out, const phi3c_segment *segments, int n_segments, phi3c_activation x, int64_t n,
                   phi3c_pool *pool) {
    phi3c_segment gate = segments[0], up = segments[n_segments - 1];
    if (n_segments == 1) {
        gate.rows = up.rows = out.columns;
        up.panels += phi3c_packed_bytes(up.type, up.rows, x.columns);
    }
    sort_all(x, n, tokens_at_once(gate.type, n), pool);
    if (n < TOKENS) {
        run(out.f32, &gate, 1, x, n, PUT, pool);
        run(out.f32, &up, 1, x, n, SILU_MUL, pool);
    } else {
        gate_up_job job = {out, &gate, &up, x, n, tokens_at_once(gate.type, n)};
        int64_t n_panels = panels_of(&gate);
        phi3c_pool_run(pool, gate_up, &job, n_panels, grain(n_panels, PAIRS, n, pool));
    }
    phi3c_quantize(out, n, pool);
}
