/* SPDX-License-Identifier: MIT */
/* What the machine allows at most, on the threads of a pool: plain reads, and int8 multiply-adds out of registers. */
#include <assert.h>

#include "atomic.h"
#include "kernels.h"
#include "pool.h"

enum { LINE = 64, STRETCH = 4096 }; /* bytes of a cache line; lines that a thread reads at a stretch: 256 KiB */

typedef struct {
    const uint8_t *memory;
    atomic_word folded;
} read_job;

static void read_lines(void *arg, int64_t first, int64_t last) {
    read_job *job = arg;
    uint64_t words[LINE / 8] = {0};
    for (const uint8_t *line = job->memory + first * LINE, *end = job->memory + last * LINE; line < end; line += LINE)
        for (int i = 0; i < LINE / 8; i++) {
            uint64_t word;
            memcpy(&word, line + 8 * i, 8);
            words[i] ^= word;
        }
    for (int i = 1; i < LINE / 8; i++) words[0] ^= words[i];
    word_xor(&job->folded, (int64_t)words[0]);
}

uint32_t phi3c_read(const uint8_t *memory, size_t n_bytes, phi3c_pool *pool) {
    assert(n_bytes % LINE == 0);
    read_job job = {memory, {0}};
    phi3c_pool_run(pool, read_lines, &job, (int64_t)(n_bytes / LINE), STRETCH);
    uint64_t folded = (uint64_t)word_load(&job.folded);
    return (uint32_t)(folded ^ folded >> 32);
}

static void run_bursts(void *arg, int64_t first, int64_t last) {
    int64_t n = 0;
    for (int64_t i = first; i < last; i++) n += phi3c_kernel.peak();
    word_add(arg, n);
}

int64_t phi3c_peak(int64_t n_bursts, phi3c_pool *pool) {
    atomic_word n = {0};
    if (phi3c_kernel.peak) phi3c_pool_run(pool, run_bursts, &n, n_bursts, 1);
    return word_load(&n);
}
