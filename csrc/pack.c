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
#include "compiler.h"
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

/* -- fields, panels, matrices ----------------------------------------------------------------------------- */

/* [n][16 rows] of elements `at` bytes into the rows' blocks */
static void transpose_u8(uint8_t *restrict dst, const uint8_t *const src[16], int at, int n) {
    for (int i = 0; i < n; i++)
        for (int r = 0; r < 16; r++) dst[i * 16 + r] = src[r][at + i];
}

static void transpose_u16(uint8_t *restrict dst, const uint8_t *const src[16], int at, int n) {
    for (int i = 0; i < n; i++)
        for (int r = 0; r < 16; r++) memcpy(dst + i * 32 + r * 2, src[r] + at + i * 2, 2);
}

/* Two rows and two elements at a time, as words of 64 bits: half as many loads and stores. */
static void transpose_u32(uint8_t *restrict dst, const uint8_t *const src[16], int at, int n, uint64_t flip) {
    for (int r = 0; r < 16; r += 2)
        for (int i = 0; i < n; i += 2) {
            uint64_t even, odd, words[2];
            memcpy(&even, src[r] + at + i * 4, 8);
            memcpy(&odd, src[r + 1] + at + i * 4, 8);
            words[0] = ((uint32_t)even | odd << 32) ^ flip;
            words[1] = (even >> 32 | odd >> 32 << 32) ^ flip;
            memcpy(dst + i * 64 + r * 4, &words[0], 8);
            memcpy(dst + i * 64 + 64 + r * 4, &words[1], 8);
        }
}

/* q4_K's and q5_K's 12 bytes: scales 0-3, mins 0-3, each with the two upper bits of number 4-7 above its six; then a
 * nibble of scale and of min 4-7. So the nibbles are those of the planes already. Scales are [s][16 rows], mins
 * [s / 2][16 rows][2], as halves are. */
static void pack_scale_min(uint8_t *restrict planes, const uint8_t *const src[16], int at) {
    uint8_t scales[64], mins[64], upper_scales[64], upper_mins[64];
    transpose_u8(scales, src, at, 4);
    transpose_u16(mins, src, at + 4, 2);
    transpose_u8(upper_scales, src, at + 8, 4);
    transpose_u16(upper_mins, src, at + 8, 2);
    for (int k = 0; k < 64; k++) {
        planes[k] = (uint8_t)((scales[k] & 15) | mins[k] << 4);
        planes[64 + k] = (uint8_t)((upper_scales[k] & 15) | (upper_mins[k] & 0xf0));
        planes[128 + k] = (uint8_t)(scales[k] >> 4 | (mins[k] & 0xf0));
    }
}

static void unpack_scale_min(uint8_t b[12], const uint8_t *planes, int row) {
    for (int s = 0; s < 4; s++) {
        int scale = s * 16 + row, min = s / 2 * 32 + row * 2 + s % 2;
        b[s] = (uint8_t)((planes[scale] & 15) | planes[128 + scale] << 4);
        b[s + 4] = (uint8_t)(planes[min] >> 4 | (planes[128 + min] & 0xf0));
        b[s + 8] = (uint8_t)((planes[64 + scale] & 15) | (planes[64 + min] & 0xf0));
    }
}

/* One field of one block of 16 rows, the blocks of which begin at src. */
static void pack_field(uint8_t *restrict dst, const uint8_t *const src[16], phi3c_field field) {
    uint32_t qh[16];
    const int at = field.offset, n = field.count;
    switch (field.kind) {
    case FIELD_U8:
    case FIELD_SCALE: transpose_u8(dst, src, at, n); break;
    case FIELD_U16: transpose_u16(dst, src, at, n); break;
    case FIELD_U32: transpose_u32(dst, src, at, n, 0); break;
    case FIELD_S32: transpose_u32(dst, src, at, n, 0x8080808080808080u); break;
    case FIELD_BIT32:
        for (int r = 0; r < 16; r++) memcpy(&qh[r], src[r] + at, 4);
        for (int r = 0; r < 16; r++) qh[r] = spread_bits(qh[r]);
        memcpy(dst, qh, 64);
        break;
    case FIELD_SCALE_MIN: pack_scale_min(dst, src, at); break;
    }
}

static void unpack_field(uint8_t *dst, const uint8_t *src, phi3c_field field, int r) {
    uint32_t four;
    switch (field.kind) {
    case FIELD_U8:
    case FIELD_SCALE:
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
    case FIELD_SCALE_MIN: unpack_scale_min(dst, src, r); break;
    }
}

typedef struct {
    uint8_t *panels;
    const uint8_t *src;
    int type;
    int64_t rows, columns;
    const int64_t *order;
} pack_job;

/* A page that is not mapped yet cannot be fetched ahead, so one byte of every page is read. */
static void fetch_ahead(const uint8_t *p) {
    if ((uintptr_t)p % 4096 < 64)
        (void)*(const volatile uint8_t *)p;
    else
        prefetch(p);
}

static void pack_panels(void *arg, int64_t first, int64_t last) {
    static const uint8_t no_block[210]; /* rows beyond the last one are blocks of zeros */
    const pack_job *job = arg;
    const phi3c_layout *layout = &phi3c_layouts[job->type];
    size_t row_size = row_bytes(job->type, job->columns);
    int64_t n_blocks = job->columns / layout->columns;
    size_t panel_bytes = PHI3C_PANEL * row_size, src_bytes = (size_t)job->rows * row_size;
    for (int64_t panel = first; panel < last; panel++) {
        uint8_t *dst = job->panels + (size_t)panel * panel_bytes;
        size_t ahead = (size_t)(panel + 1) * panel_bytes; /* of dst, in src: `order` moves rows within a head only */
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
                    size_t end = (size_t)(dst - job->panels) + panel_bytes;
                    for (; ahead < end && ahead < src_bytes; ahead += 64) fetch_ahead(job->src + ahead);
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
