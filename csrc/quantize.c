/* SPDX-License-Identifier: MIT */
/* Rows of GGUF blocks as floats: what the stored integers mean, type by type. */
#include <assert.h>

#include "kernels.h"

static void dequantize_legacy(float *out, const uint8_t *b, int type) {
    int has_min = type == PHI3C_Q4_1 || type == PHI3C_Q5_1, has_high_bit = type == PHI3C_Q5_0 || type == PHI3C_Q5_1;
    int bias = type == PHI3C_Q4_0 ? 8 : type == PHI3C_Q5_0 ? 16 : 0;
    f16 d, m = 0;
    uint32_t high = 0;
    memcpy(&d, b, 2);
    if (has_min) memcpy(&m, b + 2, 2);
    const uint8_t *qs = b + (has_min ? 4 : 2);
    if (has_high_bit) {
        memcpy(&high, qs, 4);
        qs += 4;
    }
    for (int i = 0; i < 32; i++) {
        int q = (qs[i % 16] >> (i < 16 ? 0 : 4) & 15) | (int)(high >> i & 1) << 4;
        out[i] = f16_to_f32(d) * (float)(q - bias) + f16_to_f32(m);
    }
}

static void dequantize_q8_0(float *out, const block_q8_0 *b) {
    for (int i = 0; i < 32; i++) out[i] = f16_to_f32(b->d) * b->qs[i];
}

static void dequantize_q2_K(float *out, const block_q2_K *b) {
    for (int i = 0; i < 256; i++) {
        int q = b->qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3, sc = b->scales[i / 16];
        out[i] = f16_to_f32(b->d) * (float)(sc & 15) * (float)q - f16_to_f32(b->dmin) * (float)(sc >> 4);
    }
}

static void dequantize_q3_K(float *out, const block_q3_K *b) {
    for (int i = 0; i < 256; i++) {
        int g = i / 16, low = b->qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        int q = (low | (b->hmask[i % 32] >> (i / 32) & 1) << 2) - 4;
        int sc = (g < 8 ? b->scales[g] & 15 : b->scales[g - 8] >> 4) | (b->scales[8 + g % 4] >> (g / 4 * 2) & 3) << 4;
        out[i] = f16_to_f32(b->d) * (float)(sc - 32) * (float)q;
    }
}

/* q4_K when qh is NULL, else q5_K. */
static void dequantize_q4_K(float *out, f16 d, f16 dmin, const uint8_t *b, const uint8_t *qh, const uint8_t *qs) {
    for (int i = 0; i < 256; i++) {
        int s = i / 32, q = qs[i / 64 * 32 + i % 32] >> (s % 2 * 4) & 15;
        if (qh) q |= (qh[i % 32] >> s & 1) << 4;
        int sc = s < 4 ? b[s] & 63 : (b[s + 4] & 15) | (b[s - 4] >> 6) << 4;
        int m = s < 4 ? b[s + 4] & 63 : b[s + 4] >> 4 | (b[s] >> 6) << 4;
        out[i] = f16_to_f32(d) * (float)sc * (float)q - f16_to_f32(dmin) * (float)m;
    }
}

static void dequantize_q6_K(float *out, const block_q6_K *b) {
    for (int i = 0; i < 256; i++) {
        int half = i / 128, j = i % 128 / 32, l = i % 32;
        int q = (b->ql[half * 64 + j % 2 * 32 + l] >> (j / 2 * 4) & 15) | (b->qh[half * 32 + l] >> (2 * j) & 3) << 4;
        out[i] = f16_to_f32(b->d) * (float)b->scales[i / 16] * (float)(q - 32);
    }
}

/* A block of iq4_nl, or a group of iq4_xs with its scale as d. */
static void dequantize_iq4(float *out, float d, const uint8_t *qs) {
    for (int i = 0; i < 32; i++) out[i] = d * (float)iq4_values[qs[i % 16] >> (i < 16 ? 0 : 4) & 15];
}

static void dequantize_iq4_xs(float *out, const block_iq4_xs *b) {
    for (int s = 0; s < 8; s++) {
        int sc = (b->scales_l[s / 2] >> (s % 2 * 4) & 15) | (b->scales_h >> (2 * s) & 3) << 4;
        dequantize_iq4(out + 32 * s, f16_to_f32(b->d) * (float)(sc - 32), b->qs + 16 * s);
    }
}

void phi3c_dequantize_row(float *out, const uint8_t *blocks, int type, int64_t columns) {
    int64_t block_columns = phi3c_block_columns(type);
    assert(block_columns && columns % block_columns == 0);
    for (int64_t c = 0; c < columns; c += block_columns, out += block_columns, blocks += phi3c_block_bytes(type)) {
        f16 h;
        union { /* the row may lie at any address: copy the block out */
            block_q8_0 q8_0;
            block_q2_K q2_K;
            block_q3_K q3_K;
            block_q4_K q4_K;
            block_q5_K q5_K;
            block_q6_K q6_K;
            block_iq4_nl iq4_nl;
            block_iq4_xs iq4_xs;
            uint8_t bytes[210];
        } b;
        memcpy(&b, blocks, (size_t)phi3c_block_bytes(type));
        switch (type) {
        case PHI3C_F32: memcpy(out, blocks, 128); break;
        case PHI3C_F16:
        case PHI3C_BF16:
            for (int i = 0; i < 32; i++) {
                memcpy(&h, blocks + 2 * i, 2);
                out[i] = type == PHI3C_F16 ? f16_to_f32(h) : bf16_to_f32(h);
            }
            break;
        case PHI3C_Q8_0: dequantize_q8_0(out, &b.q8_0); break;
        case PHI3C_Q2_K: dequantize_q2_K(out, &b.q2_K); break;
        case PHI3C_Q3_K: dequantize_q3_K(out, &b.q3_K); break;
        case PHI3C_Q4_K: dequantize_q4_K(out, b.q4_K.d, b.q4_K.dmin, b.q4_K.scales, NULL, b.q4_K.qs); break;
        case PHI3C_Q5_K: dequantize_q4_K(out, b.q5_K.d, b.q5_K.dmin, b.q5_K.scales, b.q5_K.qh, b.q5_K.qs); break;
        case PHI3C_Q6_K: dequantize_q6_K(out, &b.q6_K); break;
        case PHI3C_IQ4_NL: dequantize_iq4(out, f16_to_f32(b.iq4_nl.d), b.iq4_nl.qs); break;
        case PHI3C_IQ4_XS: dequantize_iq4_xs(out, &b.iq4_xs); break;
        default: dequantize_legacy(out, b.bytes, type);
        }
    }
}
