/* SPDX-License-Identifier: MIT */
/* Packed weights times activations. */
#include <assert.h>

#include "kernels.h"
#include "pool.h"

/* Tokens between two walks over a panel: their activations (24 * 12 * 448 bytes at 3072 columns) stay in L2 while a
 * panel is in L1. */
enum { TOKENS = 24 };

typedef struct {
    float *out;
    const phi3c_segment *segments;
    int64_t n_rows; /* of all segments */
    phi3c_activation x;
    int64_t n;
    int add;
} matmul_job;

static int64_t panels_of(const phi3c_segment *segment) { return (segment->rows + PHI3C_PANEL - 1) / PHI3C_PANEL; }

/* One panel of a segment, whose first row is `row` of the output, for tokens [from, to). */
static void multiply_panel(const matmul_job *job, const phi3c_segment *segment, int64_t panel, int64_t row,
                           int64_t from, int64_t to) {
    float tile[TOKENS * PHI3C_PANEL];
    int64_t columns = job->x.columns, rows = segment->rows - panel * PHI3C_PANEL;
    if (rows > PHI3C_PANEL) rows = PHI3C_PANEL;
    int is_float = segment->type <= PHI3C_F16 || segment->type == PHI3C_BF16;
    const uint8_t *x = is_float ? (const uint8_t *)job->x.f32 : job->x.x8;
    size_t x_stride = is_float ? (size_t)columns * 4 : phi3c_x8_bytes(columns);
    const uint8_t *weights = segment->panels + (size_t)panel * phi3c_packed_bytes(segment->type, PHI3C_PANEL, columns);
    phi3c_kernel.tile[segment->type](tile, weights, x + (size_t)from * x_stride, x_stride, (int)(to - from), columns);
    for (int64_t t = from; t < to; t++) {
        float *out = job->out + t * job->n_rows + row;
        const float *result = tile + (t - from) * PHI3C_PANEL;
        if (job->add)
            for (int64_t r = 0; r < rows; r++) out[r] += result[r];
        else
            memcpy(out, result, (size_t)rows * 4);
    }
}

static void multiply(void *arg, int64_t first, int64_t last) {
    const matmul_job *job = arg;
    for (int64_t from = 0; from < job->n; from += TOKENS) {
        int64_t to = from + TOKENS < job->n ? from + TOKENS : job->n;
        const phi3c_segment *segment = job->segments;
        int64_t row = 0, base = 0; /* of the segment: first output row, first panel */
        for (int64_t item = first; item < last; item++) {
            for (; item - base >= panels_of(segment); segment++) {
                base += panels_of(segment);
                row += segment->rows;
            }
            multiply_panel(job, segment, item - base, row + (item - base) * PHI3C_PANEL, from, to);
        }
    }
}

void phi3c_matmul(float *out, const phi3c_segment *segments, int n_segments, phi3c_activation x, int64_t n, int add,
                  phi3c_pool *pool) {
    matmul_job job = {out, segments, 0, x, n, add};
    int64_t n_panels = 0;
    for (int i = 0; i < n_segments; i++) {
        assert(phi3c_kernel.tile[segments[i].type]);
        job.n_rows += segments[i].rows;
        n_panels += panels_of(&segments[i]);
    }
    /* Chunks small enough to share evenly, large enough to be one long stream each. */
    int64_t grain = n_panels / (8 * phi3c_pool_size(pool));
    phi3c_pool_run(pool, multiply, &job, n_panels, grain < 1 ? 1 : grain > 8 ? 8 : grain);
}
