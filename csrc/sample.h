/* SPDX-License-Identifier: MIT */
/* From a row of logits to the next token: penalties, filters, temperature, draw. */
#ifndef PHI3C_SAMPLE_H
#define PHI3C_SAMPLE_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    float logit;
    int32_t id;
} phi3c_candidate;

typedef struct {
    double temperature;   /* 0: the most likely token, filters ignored */
    double top_p;         /* 1: off */
    double min_p;         /* 0: off */
    float repeat_penalty; /* 1: off */
    int32_t top_k;        /* 0: off */
} phi3c_sampling;

/* Bytes of scratch memory, aligned as malloc does, that the functions below need for n_vocab logits. */
size_t phi3c_sample_scratch_bytes(int32_t n_vocab);

/* Draws one of 0 < n_vocab < 2^20 tokens; -1 if a logit is NaN or infinite.
 *
 * In this order: repeat_penalty on each distinct id among `recent` (ids outside the vocabulary are ignored),
 * top_k, top_p and min_p on the probabilities at temperature 1, temperature, draw. Tokens are ranked by
 * falling logit, the lower id first among equals; every filter keeps a prefix of that ranking, and the draw
 * is the first token at which the running sum of weights exceeds the sum of all times the uniform number that
 * (seed, counter) stands for. A weight is exp((logit - largest logit) / temperature) 2^44, rounded to an integer,
 * so that sums have one value in whatever order they are taken. */
int32_t phi3c_sample(const float *logits, int32_t n_vocab, const int32_t *recent, int32_t n_recent,
                     const phi3c_sampling *params, uint64_t seed, uint64_t counter, void *scratch);

/* Returns the log-probability of `token` and writes those of the n_top <= n_vocab most likely tokens, best
 * first, in place of logits; NaN, and nothing written, if a logit is NaN or infinite. */
float phi3c_top_logprobs(const float *logits, int32_t n_vocab, int32_t token, int32_t n_top, phi3c_candidate *top,
                         void *scratch);

/* Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. */
void phi3c_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

#endif
