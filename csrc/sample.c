/* SPDX-License-Identifier: MIT */
/* Sampling without sorting the vocabulary.
 *
 * One pass takes the maximum of every block of 64 logits. The k-th largest of these maxima bounds the k-th
 * largest logit from below, so few blocks are ever looked at again: what reaches the bound goes into a heap,
 * from which tokens are popped, best first, only as far as a filter or the draw needs them.
 *
 * Weights are double and made of additions, multiplications and divisions alone, which every platform rounds
 * alike and which vectorise at baseline SSE2. phi3c_expf would not do here: its fmaf is a function call on
 * baseline x86-64. */
#include "sample.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

enum {
    BLOCK = 64,
    LANES = 16,        /* strided partial results of a reduction */
    FIRST_BATCH = 256, /* tokens ranked at first when top_k sets no limit */
};

/* ---- weights ---- */

/* exp(x) for -707 <= x <= 0, relative error below 1e-12. x = n ln2 + r, Taylor series of exp(r) to r^10. */
static inline double exp_negative(double x) {
    const double magic = 0x1.8p52; /* adding it rounds to an integer and leaves that in the low bits */
    const double shifted = x * 0x1.71547652b82fep+0 + magic;
    const double n = shifted - magic;
    const double r =
        x - n * 0x1.62e42fefa3800p-1 - n * 0x1.ef35793c76730p-45; /* ln2 in two parts; n * upper is exact */

    double p = 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 1.0 / 2;
    p = p * r + 1.0;
    p = p * r + 1.0;

    uint64_t exponent, bits;
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&bits, &p, sizeof bits);
    bits += exponent << 52;
    memcpy(&p, &bits, sizeof p);
    return p;
}

/* log(x) for finite x >= 1: x = 2^e m with m in [0.707, 1.414], log(m) = 2 artanh((m - 1) / (m + 1)). */
static double log_of_mass(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint64_t e = (bits - 0x3fe6a09e667f3bcd) >> 52; /* bits of sqrt(1/2) */
    bits -= e << 52;
    double m;
    memcpy(&m, &bits, sizeof m);

    const double s = (m - 1.0) / (m + 1.0);
    double series = 0.0;
    for (int k = 19; k > 0; k -= 2) series = series * (s * s) + 1.0 / k;
    return (double)e * 0x1.62e42fefa39efp-1 + 2.0 * s * series;
}

/* Logarithm of a token's weight, its probability relative to the most likely token; at least log(9e-308). */
static inline double log_weight(float logit, float max, double temperature) {
    const double x = ((double)logit - max) / temperature;
    return x > -707.0 ? x : -707.0;
}

static double weight(float logit, float max, double temperature) {
    return exp_negative(log_weight(logit, max, temperature));
}

/* Sum of all weights: lane j adds the logits j, j + 16, ...; the lanes are joined as a tree. Loops without
 * branches, which compilers vectorise. */
static double total_weight(const float *logits, int32_t n_vocab, float max, double temperature) {
    double lane[LANES] = {0}, weights[BLOCK];
    for (int32_t begin = 0; begin < n_vocab; begin += BLOCK) {
        const int32_t left = n_vocab - begin, n = left < BLOCK ? left : BLOCK;
        for (int32_t i = 0; i < n; i++) weights[i] = log_weight(logits[begin + i], max, temperature);
        for (int32_t i = 0; i < n; i++) weights[i] = exp_negative(weights[i]);
        for (int32_t i = 0; i < n; i++) lane[i % LANES] += weights[i];
    }
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    return lane[0];
}

/* ---- ranking ---- */

typedef struct {
    const float *logits;
    const float *block_max;
    int32_t n_vocab, n_blocks;
    float max;
    /* A heap of n_heap candidates, then those popped from it, the best one last. */
    phi3c_candidate *candidates;
    int32_t n_candidates, n_heap;
} ranking;

static inline bool outranks(phi3c_candidate a, phi3c_candidate b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

static void sift_down(phi3c_candidate *heap, int32_t n, int32_t hole, phi3c_candidate moved) {
    for (int32_t child; (child = 2 * hole + 1) < n; hole = child) {
        if (child + 1 < n && outranks(heap[child + 1], heap[child])) child++;
        if (!outranks(heap[child], moved)) break;
        heap[hole] = heap[child];
    }
    heap[hole] = moved;
}

static void heapify(phi3c_candidate *heap, int32_t n) {
    for (int32_t i = n / 2 - 1; i >= 0; i--) sift_down(heap, n, i, heap[i]);
}

/* Moves the best of a heap of n behind the others. */
static void pop(phi3c_candidate *heap, int32_t n) {
    const phi3c_candidate best = heap[0], last = heap[n - 1];
    sift_down(heap, n - 1, 0, last);
    heap[n - 1] = best;
}

/* Maximum of each block; false if a logit is NaN or infinite. Integers that sort as the floats do: compilers
 * vectorise their maximum, but not that of floats, which has to care about NaN. */
static bool find_maxima(ranking *r, float *block_max) {
    r->block_max = block_max;
    r->max = -FLT_MAX;
    bool finite = true;
    for (int32_t b = 0; b < r->n_blocks; b++) {
        const int32_t begin = b * BLOCK, left = r->n_vocab - begin, n = left < BLOCK ? left : BLOCK;
        int32_t max = INT32_MIN, overflow = 0;
        for (int32_t i = 0; i < n; i++) {
            int32_t bits;
            memcpy(&bits, r->logits + begin + i, sizeof bits);
            overflow |= (bits & 0x7f800000) == 0x7f800000;
            bits ^= bits < 0 ? 0x7fffffff : 0;
            max = bits > max ? bits : max;
        }
        max ^= max < 0 ? 0x7fffffff : 0;
        memcpy(block_max + b, &max, sizeof max);
        r->max = block_max[b] > r->max ? block_max[b] : r->max;
        finite = finite && !overflow;
    }
    return finite;
}

/* Lowest id with the largest logit. */
static int32_t most_likely(const ranking *r) {
    int32_t i = 0;
    while (r->block_max[i] != r->max) i++;
    i *= BLOCK;
    while (r->logits[i] != r->max) i++;
    return i;
}

/* Makes a heap of all logits >= threshold. */
static void gather(ranking *r, float threshold) {
    int32_t n = 0;
    for (int32_t b = 0; b < r->n_blocks; b++) {
        if (r->block_max[b] < threshold) continue;
        const int32_t begin = b * BLOCK, left = r->n_vocab - begin, end = begin + (left < BLOCK ? left : BLOCK);
        for (int32_t i = begin; i < end; i++) {
            r->candidates[n] = (phi3c_candidate){r->logits[i], i};
            n += r->logits[i] >= threshold;
        }
    }
    heapify(r->candidates, n);
    r->n_candidates = r->n_heap = n;
}

/* Prepares for at least `count` tokens to be asked for. */
static void gather_best(ranking *r, int32_t count) {
    if (count > r->n_blocks) {
        gather(r, -FLT_MAX);
        return;
    }
    for (int32_t b = 0; b < r->n_blocks; b++) r->candidates[b] = (phi3c_candidate){r->block_max[b], b};
    heapify(r->candidates, r->n_blocks);
    for (int32_t i = 0; i < count; i++) pop(r->candidates, r->n_blocks - i);
    gather(r, r->candidates[r->n_blocks - count].logit);
}

/* The token at `rank`, 0 being the best. Falls back to ranking the whole vocabulary. */
static phi3c_candidate ranked(ranking *r, int32_t rank) {
    while (r->n_candidates - r->n_heap <= rank) {
        if (r->n_heap > 0)
            pop(r->candidates, r->n_heap--);
        else
            gather(r, -FLT_MAX);
    }
    return r->candidates[r->n_candidates - 1 - rank];
}

/* Sum of the weights of the first n tokens. */
static double mass(ranking *r, int32_t n, double temperature) {
    if (n == r->n_vocab) return total_weight(r->logits, n, r->max, temperature);
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) sum += weight(ranked(r, i).logit, r->max, temperature);
    return sum;
}

/* ---- chain ---- */

/* How many of the first `limit` tokens top_p and min_p leave, at least one. */
static int32_t count_survivors(ranking *r, int32_t limit, double top_p, double min_p) {
    if (top_p >= 1.0 && min_p <= 0.0) return limit;
    const double needed = top_p < 1.0 ? top_p * mass(r, limit, 1.0) : INFINITY;
    double sum = 0.0;
    for (int32_t i = 0; i < limit; i++) {
        const double w = weight(ranked(r, i).logit, r->max, 1.0);
        if (w < min_p) return i;
        sum += w;
        if (sum >= needed) return i + 1;
    }
    return limit;
}

static int32_t draw(ranking *r, int32_t n, double temperature, double uniform) {
    const double target = uniform * mass(r, n, temperature);
    double sum = 0.0;
    for (int32_t i = 0; i < n - 1; i++) {
        const phi3c_candidate c = ranked(r, i);
        sum += weight(c.logit, r->max, temperature);
        if (sum > target) return c.id;
    }
    return ranked(r, n - 1).id;
}

void phi3c_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c[4], k0 = key[0], k1 = key[1];
    memcpy(c, counter, sizeof c);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[1] = (uint32_t)b;
        c[3] = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    memcpy(out, c, sizeof c);
}

/* Multiple of 2^-53 in [0, 1): the upper 53 bits of the first two words, the second word leading. */
static double uniform(uint64_t seed, uint64_t counter) {
    const uint32_t words[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t out[4];
    phi3c_philox4x32(words, key, out);
    return (double)(((uint64_t)out[1] << 32 | out[0]) >> 11) * 0x1p-53;
}

/* ---- entry points ---- */

static int32_t count_blocks(int32_t n_vocab) { return (n_vocab + BLOCK - 1) / BLOCK; }

/* scratch: candidates[n_vocab], block maxima[n_blocks], penalised logits[n_vocab] */
size_t phi3c_sample_scratch_bytes(int32_t n_vocab) {
    return (size_t)n_vocab * sizeof(phi3c_candidate) +
           ((size_t)count_blocks(n_vocab) + (size_t)n_vocab) * sizeof(float);
}

static bool rank(ranking *r, const float *logits, int32_t n_vocab, void *scratch) {
    *r = (ranking){.logits = logits, .n_vocab = n_vocab, .n_blocks = count_blocks(n_vocab), .candidates = scratch};
    return find_maxima(r, (float *)(r->candidates + n_vocab));
}

/* Divides positive logits and multiplies the others, so that a penalty above 1 always lowers them. Each
 * result comes from the raw logit: an id that occurs twice is penalised once. */
static void penalise(float *out, const float *logits, int32_t n_vocab, const int32_t *recent, int32_t n_recent,
                     float penalty) {
    memcpy(out, logits, (size_t)n_vocab * sizeof *out);
    for (int32_t i = 0; i < n_recent; i++) {
        const int32_t id = recent[i];
        if (id < 0 || id >= n_vocab) continue;
        out[id] = logits[id] > 0.0f ? logits[id] / penalty : logits[id] * penalty;
    }
}

int32_t phi3c_sample(const float *logits, int32_t n_vocab, const int32_t *recent, int32_t n_recent,
                     const phi3c_sampling *params, uint64_t seed, uint64_t counter, void *scratch) {
    assert(n_vocab > 0);
    if (params->repeat_penalty != 1.0f && n_recent > 0) {
        float *penalised = (float *)((phi3c_candidate *)scratch + n_vocab) + count_blocks(n_vocab);
        penalise(penalised, logits, n_vocab, recent, n_recent, params->repeat_penalty);
        logits = penalised;
    }
    ranking r;
    if (!rank(&r, logits, n_vocab, scratch)) return -1;
    if (params->temperature == 0.0) return most_likely(&r);

    const bool limited = params->top_k > 0 && params->top_k < n_vocab;
    const int32_t limit = limited ? params->top_k : n_vocab;
    gather_best(&r, limited ? limit : FIRST_BATCH);
    const int32_t n = count_survivors(&r, limit, params->top_p, params->min_p);
    return draw(&r, n, params->temperature, uniform(seed, counter));
}

float phi3c_top_logprobs(const float *logits, int32_t n_vocab, int32_t token, int32_t n_top, phi3c_candidate *top,
                         void *scratch) {
    assert(token >= 0 && token < n_vocab && n_top <= n_vocab);
    ranking r;
    if (!rank(&r, logits, n_vocab, scratch)) return NAN;
    const double log_sum = r.max + log_of_mass(mass(&r, n_vocab, 1.0));
    if (n_top > 0) gather_best(&r, n_top);
    for (int32_t i = 0; i < n_top; i++) {
        top[i] = ranked(&r, i);
        top[i].logit = (float)(top[i].logit - log_sum);
    }
    return (float)(logits[token] - log_sum);
}
