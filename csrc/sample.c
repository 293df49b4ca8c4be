/* SPDX-License-Identifier: MIT */
/* Sampling without sorting.
 *
 * Every filter keeps a prefix of the ranking, and the draw is the first token at which a running sum passes a
 * number: both ask where in the ranking a sum is reached. A radix selection answers that from the sums of weights
 * of few large groups, since weights are integers and their sums the same in any order.
 *
 * One pass takes the maximum of every block of 64 logits. The k-th largest of these maxima bounds the k-th
 * largest logit from below, so with top_k few blocks are ever looked at again. */
#include "sample.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "softmax.h"

enum {
    BLOCK = PHI3C_LOGITS_BLOCK,
    DIGIT_BITS = 11, /* of the radix selection */
    DIGIT_VALUES = 1 << DIGIT_BITS,
};

/* ---- weights ---- */

/* Weights of n logits: relative probabilities times 2^44, rounded to integers. Returns their sum, which 2^20
 * weights cannot overflow. */
static uint64_t weigh(uint64_t *weights, const float *logits, int32_t n, float max, double temperature) {
    uint64_t sum = 0;
    for (int32_t begin = 0; begin < n; begin += BLOCK) {
        const int32_t count = n - begin < BLOCK ? n - begin : BLOCK;
        double p[BLOCK];
        phi3c_relative(p, logits + begin, count, max, temperature);
        for (int32_t i = 0; i < count; i++) {
            double integer = p[i] * 0x1p44 + 0x1p52; /* in the low bits */
            uint64_t bits;
            memcpy(&bits, &integer, sizeof bits);
            sum += weights[begin + i] = bits & (((uint64_t)1 << 52) - 1);
        }
    }
    return sum;
}

/* ---- ranking ---- */

/* Tokens by rising id. */
typedef struct {
    float *logits; /* no -0 */
    int32_t *ids;
    uint64_t *weights;
    int32_t n;
} token_set;

typedef struct {
    const float *logits;
    float *block_max;
    int32_t n_vocab, n_blocks;
    float max;
    token_set kept;
} ranking;

/* Maximum of each block; false if a logit is NaN or infinite. */
static bool find_maxima(ranking *r) {
    r->max = -FLT_MAX;
    bool finite = true;
    for (int32_t b = 0; b < r->n_blocks; b++) {
        const int32_t begin = b * BLOCK, left = r->n_vocab - begin;
        r->block_max[b] = phi3c_largest(r->logits + begin, left < BLOCK ? left : BLOCK, &finite);
        r->max = r->block_max[b] > r->max ? r->block_max[b] : r->max;
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

/* Unsigned integer that sorts as the float does, -0 aside. */
static inline uint64_t sort_key(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
}

/* Index of the first logit, in the order of falling logits and rising indices, at which the running sum of weights
 * exceeds `target`, which is less than the sum of all. Without weights every logit weighs 1. */
static int32_t reach(const float *logits, const uint64_t *weights, int32_t n, uint64_t target) {
    uint64_t prefix = 0, sum = 0; /* leading digits of the key sought; of the weights of all larger keys */
    for (int shift = 3 * DIGIT_BITS; shift > 0;) {
        const int above = shift;
        shift -= DIGIT_BITS;
        uint64_t sums[DIGIT_VALUES] = {0};
        for (int32_t i = 0; i < n; i++) {
            const uint64_t key = sort_key(logits[i]);
            if (key >> above == prefix) sums[key >> shift & (DIGIT_VALUES - 1)] += weights ? weights[i] : 1;
        }
        uint64_t digit = DIGIT_VALUES - 1;
        while (sum + sums[digit] <= target) sum += sums[digit--];
        prefix = prefix << DIGIT_BITS | digit;
    }
    int32_t i = 0;
    for (;; i++) {
        if (sort_key(logits[i]) != prefix) continue;
        sum += weights ? weights[i] : 1;
        if (sum > target) return i;
    }
}

/* Keeps tokens above `logit`, and of those equal to it the ones up to index `last`. */
static void cut(token_set *s, double logit, int32_t last) {
    int32_t n = 0;
    for (int32_t i = 0; i < s->n; i++) {
        s->logits[n] = s->logits[i];
        s->ids[n] = s->ids[i];
        n += s->logits[i] > logit || (s->logits[i] == logit && i <= last);
    }
    s->n = n;
}

/* Keeps what ranks up to the token at which the sum of weights exceeds `target`. */
static void cut_at(token_set *s, const uint64_t *weights, uint64_t target) {
    const int32_t last = reach(s->logits, weights, s->n, target);
    cut(s, s->logits[last], last);
}

/* Keeps the `count` most likely tokens of the vocabulary. */
static void keep_best(ranking *r, int32_t count) {
    token_set *s = &r->kept;
    const float bound =
        count <= r->n_blocks ? r->block_max[reach(r->block_max, NULL, r->n_blocks, (uint64_t)count - 1)] : -FLT_MAX;
    s->n = 0;
    for (int32_t b = 0; b < r->n_blocks; b++) {
        if (r->block_max[b] < bound) continue;
        const int32_t begin = b * BLOCK, left = r->n_vocab - begin, end = begin + (left < BLOCK ? left : BLOCK);
        for (int32_t i = begin; i < end; i++) {
            s->logits[s->n] = r->logits[i] + 0.0f; /* makes 0 of -0, which equals it */
            s->ids[s->n] = i;
            s->n += r->logits[i] >= bound;
        }
    }
    if (s->n > count) cut_at(s, NULL, (uint64_t)count - 1);
}

/* ---- chain ---- */

/* Keeps what top_p and min_p leave of the set, at least one token. */
static void keep_likely(ranking *r, double top_p, double min_p) {
    token_set *s = &r->kept;
    if (top_p < 1.0) {
        const uint64_t mass = weigh(s->weights, s->logits, s->n, r->max, 1.0);
        const uint64_t needed = (uint64_t)ceil(top_p * (double)mass);
        cut_at(s, s->weights, needed == 0 ? 0 : needed < mass ? needed - 1 : mass - 1);
    }
    if (min_p > 0.0) cut(s, r->max - phi3c_log_from_1(1.0 / min_p), s->n);
}

static int32_t draw(ranking *r, double temperature, double uniform) {
    token_set *s = &r->kept;
    const uint64_t mass = weigh(s->weights, s->logits, s->n, r->max, temperature);
    const uint64_t target = (uint64_t)(uniform * (double)mass);
    return s->ids[reach(s->logits, s->weights, s->n, target < mass ? target : mass - 1)];
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

/* scratch: weights, ids, logits and penalised logits, each [n_vocab], then block maxima */
size_t phi3c_sample_scratch_bytes(int32_t n_vocab) {
    const size_t n = (size_t)n_vocab;
    return n * (sizeof(uint64_t) + sizeof(int32_t) + 2 * sizeof(float)) + (size_t)count_blocks(n_vocab) * sizeof(float);
}

static bool rank(ranking *r, const float *logits, int32_t n_vocab, void *scratch) {
    uint64_t *weights = scratch;
    int32_t *ids = (int32_t *)(weights + n_vocab);
    float *kept = (float *)(ids + n_vocab);
    *r = (ranking){.logits = logits, .block_max = kept + 2 * (size_t)n_vocab, .n_vocab = n_vocab};
    r->n_blocks = count_blocks(n_vocab);
    r->kept = (token_set){kept, ids, weights, 0};
    return find_maxima(r);
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
    assert(n_vocab > 0 && n_vocab < 1 << 20);
    if (params->repeat_penalty != 1.0f && n_recent > 0) {
        float *penalised = (float *)((uint64_t *)scratch + n_vocab) + 2 * (size_t)n_vocab;
        penalise(penalised, logits, n_vocab, recent, n_recent, params->repeat_penalty);
        logits = penalised;
    }
    ranking r;
    if (!rank(&r, logits, n_vocab, scratch)) return -1;
    if (params->temperature == 0.0) return most_likely(&r);

    keep_best(&r, params->top_k > 0 && params->top_k < n_vocab ? params->top_k : n_vocab);
    keep_likely(&r, params->top_p, params->min_p);
    return draw(&r, params->temperature, uniform(seed, counter));
}

float phi3c_top_logprobs(const float *logits, int32_t n_vocab, int32_t token, int32_t n_top, phi3c_candidate *top,
                         void *scratch) {
    assert(token >= 0 && token < n_vocab && n_top <= n_vocab);
    ranking r;
    if (!rank(&r, logits, n_vocab, scratch)) return NAN;
    const double log_sum = r.max + phi3c_log_from_1(phi3c_total(logits, n_vocab, r.max));
    if (n_top > 0) keep_best(&r, n_top);
    for (int32_t i = 0; i < n_top; i++) { /* insertion sort; of equals the lower id comes first already */
        int32_t place = i;
        for (; place > 0 && top[place - 1].logit < r.kept.logits[i]; place--) top[place] = top[place - 1];
        top[place] = (phi3c_candidate){r.kept.logits[i], r.kept.ids[i]};
    }
    for (int32_t i = 0; i < n_top; i++) top[i].logit = (float)(top[i].logit - log_sum);
    return (float)(logits[token] - log_sum);
}
