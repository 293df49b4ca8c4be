/* SPDX-License-Identifier: MIT */
/* From GGUF rows to P16 panels and back.
 *
 * A panel is 16 rows. It is a sequence of super-blocks of 256 columns; in each, the fields of layout.h follow one
 * another, every field for all blocks of the super-block. So the packed weights have exactly the bytes of the
 * file, and a kernel that walks the columns reads one contiguous stream. */
#include "layout.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"
#include "phi3c.h"
#include "pool.h"

#define AT(type, field) offsetof(block_##type, field)

// clang-format off
const phi3c_layout phi3c_layouts[PHI3C_N_TYPES] = {
    [PHI3C_F32] = {32, 128, 8, {{FIELD_U32, 0, 32}}},
    [PHI3C_F16] = {32, 64, 8, {{FIELD_U16, 0, 32}}},
    [PHI3C_BF16] = {32, 64, 8, {{FIELD_U16, 0, 32}}},
    [PHI3C_Q4_0] = {32, 18, 8, {{FIELD_U16, AT(q4_0, d), 1}, {FIELD_U32, AT(q4_0, qs), 4}}},
    [PHI3C_Q4_1] = {32, 20, 8, {{FIELD_U16, AT(q4_1, d), 1}, {FIELD_U16, AT(q4_1, m), 1}, {FIELD_U32, AT(q4_1, qs), 4}}},
    [PHI3C_Q5_0] = {32, 22, 8, {{FIELD_U16, AT(q5_0, d), 1}, {FIELD_BIT32, AT(q5_0, qh), 1}, {FIELD_U32, AT(q5_0, qs), 4}}},
    [PHI3C_Q5_1] = {32, 24, 8, {{FIELD_U16, AT(q5_1, d), 1}, {FIELD_U16, AT(q5_1, m), 1}, {FIELD_BIT32, AT(q5_1, qh), 1}, {FIELD_U32, AT(q5_1, qs), 4}}},
    [PHI3C_Q8_0] = {32, 34, 8, {{FIELD_U16, AT(q8_0, d), 1}, {FIELD_S32, AT(q8_0, qs), 8}}},
    [PHI3C_Q2_K] = {256, 84, 1, {{FIELD_U16, AT(q2_K, d), 1}, {FIELD_U16, AT(q2_K, dmin), 1}, {FIELD_U8, AT(q2_K, scales), 16}, {FIELD_U32, AT(q2_K, qs), 16}}},
    [PHI3C_Q3_K] = {256, 110, 1, {{FIELD_U16, AT(q3_K, d), 1}, {FIELD_SCALE, AT(q3_K, scales), 12}, {FIELD_U32, AT(q3_K, hmask), 8}, {FIELD_U32, AT(q3_K, qs), 16}}},
    [PHI3C_Q4_K] = {256, 144, 1, {{FIELD_U16, AT(q4_K, d), 1}, {FIELD_U16, AT(q4_K, dmin), 1}, {FIELD_SCALE_MIN, AT(q4_K, scales), 12}, {FIELD_U32, AT(q4_K, qs), 32}}},
    [PHI3C_Q5_K] = {256, 176, 1, {{FIELD_U16, AT(q5_K, d), 1}, {FIELD_U16, AT(q5_K, dmin), 1}, {FIELD_SCALE_MIN, AT(q5_K, scales), 12}, {FIELD_U32, AT(q5_K, qh), 8}, {FIELD_U32, AT(q5_K, qs), 32}}},
    [PHI3C_Q6_K] = {256, 210, 1, {{FIELD_U16, AT(q6_K, d), 1}, {FIELD_U8, AT(q6_K, scales), 16}, {FIELD_U32, AT(q6_K, qh), 16}, {FIELD_U32, AT(q6_K, ql), 32}}},
    [PHI3C_IQ4_NL] = {32, 18, 8, {{FIELD_U16, AT(iq4_nl, d), 1}, {FIELD_U32, AT(iq4_nl, qs), 4}}},
    [PHI3C_IQ4_XS] = {256, 136, 1, {{FIELD_U16, AT(iq4_xs, d), 1}, {FIELD_U16, AT(iq4_xs, scales_h), 1}, {FIELD_U8, AT(iq4_xs, scales_l), 4}, {FIELD_U32, AT(iq4_xs, qs), 32}}},
};
// clang-format on

/* Bytes of a field in one row. */
static int field_bytes(phi3c_field field) {
    switch (field.kind) {
    case FIELD_U16: return 2 * field.count;
    case FIELD_U32:
    case FIELD_S32:
    case FIELD_BIT32: return 4 * field.count;
    default: return field.count;
    }
}

int phi3c_block_columns(int type) { return type >= 0 && type < PHI3C_N_TYPES ? phi3c_layouts[type].columns : 0; }
int phi3c_block_bytes(int type) { return type >= 0 && type < PHI3C_N_TYPES ? phi3c_layouts[type].bytes : 0; }

static size_t row_bytes(int type, int64_t columns) {
    return (size_t)(columns / phi3c_layouts[type].columns) * (size_t)phi3c_layouts[type].bytes;
}

size_t phi3c_packed_bytes(int type, int64_t rows, int64_t columns) {
    return (size_t)((rows + PHI3C_PANEL - 1) / PHI3C_PANEL) * PHI3C_PANEL * row_bytes(type, columns);
}

/* -- the fields that are more than a transpose ------------------------------------------------------------ */

/* Bits 0, 4, 8, ... 28 of x, side by side. */
static uint32_t every_fourth_bit(uint32_t x) {
    x &= 0x11111111u;
    x = (x | x >> 3) & 0x03030303u;
    x = (x | x >> 6) & 0x000f000fu;
    return (x | x >> 12) & 0xffu;
}

static uint32_t spread_bits(uint32_t qh) {
    return every_fourth_bit(qh) | every_fourth_bit(qh >> 1) << 8 | every_fourth_bit(qh >> 2) << 16 |
           every_fourth_bit(qh >> 3) << 24;
}

static void gather_bits(uint8_t *qh, uint32_t spread) {
    memset(qh, 0, 4);
    for (int column = 0; column < 32; column++)
        qh[column / 8] |= (uint8_t)((spread >> (8 * (column % 4) + column / 4) & 1) << (column % 8));
}

/* q4_K's and q5_K's 12 bytes hold 16 six-bit numbers: scales 0-7, then mins 0-7. */
static void scale_min_from_12(uint8_t v[16], const uint8_t *b) {
    for (int s = 0; s < 4; s++) {
        v[s] = b[s] & 63;
        v[8 + s] = b[s + 4] & 63;
        v[4 + s] = (uint8_t)((b[s + 8] & 15) | (b[s] >> 6) << 4);
        v[12 + s] = (uint8_t)(b[s + 8] >> 4 | (b[s + 4] >> 6) << 4);
    }
}

void phi3c_scale_min_to_12(uint8_t *b, const uint8_t v[16]) {
    for (int s = 0; s < 4; s++) {
        b[s] = (uint8_t)(v[s] | (v[4 + s] >> 4) << 6);
        b[s + 4] = (uint8_t)(v[8 + s] | (v[12 + s] >> 4) << 6);
        b[s + 8] = (uint8_t)((v[4 + s] & 15) | (v[12 + s] & 15) << 4);
    }
}

/* q3_K's 12 bytes hold 16 six-bit scales: low nibbles in bytes 0-7, upper bits in bytes 8-11. */
static void scale_from_12(uint8_t v[16], const uint8_t *b) {
    for (int s = 0; s < 16; s++) {
        int low = s < 8 ? b[s] & 15 : b[s - 8] >> 4;
        v[s] = (uint8_t)(low | (b[8 + s % 4] >> (2 * (s / 4)) & 3) << 4);
    }
}

void phi3c_scale_to_12(uint8_t *b, const uint8_t v[16]) {
    memset(b, 0, 12);
    for (int s = 0; s < 16; s++) {
        b[s % 8] |= (uint8_t)((v[s] & 15) << (s < 8 ? 0 : 4));
        b[8 + s % 4] |= (uint8_t)((v[s] >> 4) << (2 * (s / 4)));
    }
}

/* Where value s of a row stands among the 256 of a panel. Scales (and all of q3_K's) are [s][16 rows], ready to
 * be lanes; mins are pairs [s / 2][16 rows][2], ready for a 16-bit pairwise multiply-add. */
static int plane_index(int kind, int s, int row) {
    if (kind == FIELD_SCALE || s < 8) return s * 16 + row;
    return 128 + (s - 8) / 2 * 32 + row * 2 + s % 2;
}

/* Plane bytes: low[k] = nibble of value k | nibble of value k + 128 << 4, for k < 128;
 * high[k] = two upper bits of values k, k + 64, k + 128 and k + 192, for k < 64. */
static void put_planes(uint8_t *restrict planes, const uint8_t v[256]) {
    for (int k = 0; k < 128; k++) planes[k] = (uint8_t)((v[k] & 15) | v[k + 128] << 4);
    for (int k = 0; k < 64; k++)
        planes[128 + k] = (uint8_t)(v[k] >> 4 | v[k + 64] >> 4 << 2 | v[k + 128] >> 4 << 4 | v[k + 192] >> 4 << 6);
}

static void get_planes(uint8_t v[16], const uint8_t *planes, int kind, int row) {
    for (int s = 0; s < 16; s++) {
        int k = plane_index(kind, s, row);
        v[s] =
            (uint8_t)((planes[k % 128] >> (k < 128 ? 0 : 4) & 15) | (planes[128 + k % 64] >> (2 * (k / 64)) & 3) << 4);
    }
}

/* -- fields, panels, matrices ----------------------------------------------------------------------------- */

/* One field of one block of 16 rows, the blocks of which begin at src. */
static void pack_field(uint8_t *restrict dst, const uint8_t *const src[16], phi3c_field field) {
    uint8_t v[16], panel[256];
    uint32_t qh[16];
    const int at = field.offset, n = field.count;
    switch (field.kind) {
    case FIELD_U8:
        for (int i = 0; i < n; i++)
            for (int r = 0; r < 16; r++) dst[i * 16 + r] = src[r][at + i];
        break;
    case FIELD_U16:
        for (int i = 0; i < n; i++)
            for (int r = 0; r < 16; r++) memcpy(dst + i * 32 + r * 2, src[r] + at + i * 2, 2);
        break;
    case FIELD_U32:
    case FIELD_S32:
        for (int r = 0; r < 16; r++)
            for (int i = 0; i < n; i++) memcpy(dst + i * 64 + r * 4, src[r] + at + i * 4, 4);
        if (field.kind == FIELD_S32)
            for (int i = 0; i < n * 64; i++) dst[i] ^= 0x80;
        break;
    case FIELD_BIT32:
        for (int r = 0; r < 16; r++) memcpy(&qh[r], src[r] + at, 4);
        for (int r = 0; r < 16; r++) qh[r] = spread_bits(qh[r]);
        memcpy(dst, qh, 64);
        break;
    default:
        for (int r = 0; r < 16; r++) {
            if (field.kind == FIELD_SCALE_MIN)
                scale_min_from_12(v, src[r] + at);
            else
                scale_from_12(v, src[r] + at);
            for (int s = 0; s < 16; s++) panel[plane_index(field.kind, s, r)] = v[s];
        }
        put_planes(dst, panel);
    }
}

static void unpack_field(uint8_t *dst, const uint8_t *src, phi3c_field field, int r) {
    uint8_t v[16];
    uint32_t four;
    switch (field.kind) {
    case FIELD_U8:
        for (int i = 0; i < field.count; i++) dst[i] = src[i * 16 + r];
        break;
    case FIELD_U16:
        for (int i = 0; i < field.count; i++) memcpy(dst + i * 2, src + i * 32 + r * 2, 2);
        break;
    case FIELD_U32:
        for (int i = 0; i < field.count; i++) memcpy(dst + i * 4, src + i * 64 + r * 4, 4);
        break;
    case FIELD_S32:
        for (int i = 0; i < field.count; i++) {
            memcpy(&four, src + i * 64 + r * 4, 4);
            four ^= 0x80808080u;
            memcpy(dst + i * 4, &four, 4);
        }
        break;
    case FIELD_BIT32:
        memcpy(&four, src + r * 4, 4);
        gather_bits(dst, four);
        break;
    default:
        get_planes(v, src, field.kind, r);
        if (field.kind == FIELD_SCALE_MIN)
            phi3c_scale_min_to_12(dst, v);
        else
            phi3c_scale_to_12(dst, v);
    }
}

typedef struct {
    uint8_t *panels;
    const uint8_t *src;
    int type;
    int64_t rows, columns;
    const int64_t *order;
} pack_job;

static void pack_panels(void *arg, int64_t first, int64_t last) {
    static const uint8_t no_block[210]; /* rows beyond the last one are blocks of zeros */
    const pack_job *job = arg;
    const phi3c_layout *layout = &phi3c_layouts[job->type];
    size_t row_size = row_bytes(job->type, job->columns);
    int64_t n_blocks = job->columns / layout->columns;
    for (int64_t panel = first; panel < last; panel++) {
        uint8_t *dst = job->panels + (size_t)panel * PHI3C_PANEL * row_size;
        const uint8_t *rows[16];
        for (int r = 0; r < 16; r++) {
            int64_t row = panel * PHI3C_PANEL + r;
            rows[r] = row < job->rows ? job->src + (size_t)(job->order ? job->order[row] : row) * row_size : NULL;
        }
        for (int64_t super = 0; super < n_blocks; super += layout->blocks) {
            int n = (int)(n_blocks - super < layout->blocks ? n_blocks - super : layout->blocks);
            const uint8_t *src[8][16];
            for (int block = 0; block < n; block++)
                for (int r = 0; r < 16; r++)
                    src[block][r] = rows[r] ? rows[r] + (super + block) * layout->bytes : no_block;
            for (const phi3c_field *field = layout->fields; field->count; field++)
                for (int block = 0; block < n; block++) {
                    pack_field(dst, src[block], *field);
                    dst += 16 * field_bytes(*field);
                }
        }
    }
}

void phi3c_pack(uint8_t *panels, const uint8_t *src, int type, int64_t rows, int64_t columns, const int64_t *order,
                phi3c_pool *pool) {
    assert(phi3c_block_columns(type) && columns % phi3c_block_columns(type) == 0);
    pack_job job = {panels, src, type, rows, columns, order};
    /* A chunk fills about a huge page: two threads that first touch the same one would both zero it. */
    int64_t grain = (2 << 20) / (int64_t)(PHI3C_PANEL * row_bytes(type, columns));
    phi3c_pool_run(pool, pack_panels, &job, (rows + PHI3C_PANEL - 1) / PHI3C_PANEL, grain > 1 ? grain : 1);
}

void phi3c_unpack_row(uint8_t *blocks, const uint8_t *panels, int type, int64_t row, int64_t columns) {
    const phi3c_layout *layout = &phi3c_layouts[type];
    const uint8_t *src = panels + (size_t)(row / PHI3C_PANEL) * PHI3C_PANEL * row_bytes(type, columns);
    int64_t n_blocks = columns / layout->columns;
    for (int64_t super = 0; super < n_blocks; super += layout->blocks) {
        int64_t n = n_blocks - super < layout->blocks ? n_blocks - super : layout->blocks;
        for (const phi3c_field *field = layout->fields; field->count; field++)
            for (int64_t block = super; block < super + n; block++) {
                unpack_field(blocks + block * layout->bytes + field->offset, src, *field, (int)(row % PHI3C_PANEL));
                src += 16 * field_bytes(*field);
            }
    }
}
