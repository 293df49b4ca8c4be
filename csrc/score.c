/* SPDX-License-Identifier: MIT */
/* How likely rows of logits find what comes next, and how far they lie from another model's: a row is a piece of
 * work, and double throughout, so that a mean over a long text has digits to spare. */
#include <assert.h>
#include <math.h>

#include "pool.h"
#include "softmax.h"

/* Below this log-probability a token of the base does not count. */
#define TAIL (-16.0)

typedef struct {
    double *out;
    const float *logits;
    int64_t n_vocab;
    const double *log_sums;
    phi3c_base base;
} score_job;

static void log_sum_exp(void *arg, int64_t first, int64_t last) {
    const score_job *job = arg;
    const int32_t n_vocab = (int32_t)job->n_vocab;
    for (int64_t row = first; row < last; row++) {
        const float *logits = job->logits + row * job->n_vocab;
        bool finite = true;
        const float max = phi3c_largest(logits, n_vocab, &finite);
        job->out[row] = finite ? max + phi3c_log_from_1(phi3c_total(logits, n_vocab, max)) : NAN;
    }
}

void phi3c_log_sum_exp(double *out, const float *logits, int64_t n, int64_t n_vocab, phi3c_pool *pool) {
    assert(0 < n_vocab && n_vocab < INT32_MAX);
    score_job job = {.out = out, .logits = logits, .n_vocab = n_vocab};
    phi3c_pool_run(pool, log_sum_exp, &job, n, 1);
}

/* Lane j adds the tokens j, j + 16, ... */
static void kl_divergence(void *arg, int64_t first, int64_t last) {
    const score_job *job = arg;
    const phi3c_base *base = &job->base;
    for (int64_t row = first; row < last; row++) {
        const float *logits = job->logits + row * job->n_vocab;
        const uint16_t *steps = base->steps + row * base->stride;
        const double scale = base->scales[row], min = base->mins[row], log_sum = job->log_sums[row];
        double lane[PHI3C_LANES] = {0}, log_p[PHI3C_LOGITS_BLOCK], p[PHI3C_LOGITS_BLOCK];
        for (int64_t begin = 0; begin < job->n_vocab; begin += PHI3C_LOGITS_BLOCK) {
            const int64_t left = job->n_vocab - begin, n = left < PHI3C_LOGITS_BLOCK ? left : PHI3C_LOGITS_BLOCK;
            for (int64_t i = 0; i < n; i++) {
                const double x = min + scale * steps[begin + i];
                log_p[i] = x > TAIL ? x : TAIL;
            }
            for (int64_t i = 0; i < n; i++) p[i] = phi3c_exp_negative(log_p[i]);
            for (int64_t i = 0; i < n; i++) {
                const double term = p[i] * (log_p[i] - (logits[begin + i] - log_sum));
                lane[i % PHI3C_LANES] += log_p[i] > TAIL ? term : 0.0;
            }
        }
        job->out[row] = phi3c_join(lane);
    }
}

void phi3c_kl_divergence(double *out, phi3c_base base, const float *logits, const double *log_sums, int64_t n,
                         int64_t n_vocab, phi3c_pool *pool) {
    score_job job = {.out = out, .logits = logits, .n_vocab = n_vocab, .log_sums = log_sums, .base = base};
    phi3c_pool_run(pool, kl_divergence, &job, n, 1);
}
