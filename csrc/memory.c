/* SPDX-License-Identifier: MIT */
/* Memory from the system. Zeroed memory begins with a line of the cache; a huge page or more of it is zeroed when it is
 * first touched. */
#include "atomic.h"

enum { AROUND = 64 << 10 };  /* what Linux maps of a file when a byte of it is touched, if it is in memory */
enum { AT_ONCE = 16 << 20 }; /* what the system is told to read from disk before that */

static void will_need(const uint8_t *file, size_t n_bytes);

void phi3c_read_ahead(const uint8_t *file, size_t n_bytes, const atomic_word *stop) {
    size_t told = 0;
    for (size_t at = 0; at < n_bytes && !word_load(stop); at += AROUND) {
        while (told < n_bytes && told <= at + AT_ONCE) {
            size_t n = n_bytes - told < AT_ONCE ? n_bytes - told : AT_ONCE;
            will_need(file + told, n);
            told += n;
        }
        (void)*(const volatile uint8_t *)(file + at);
    }
}

void phi3c_stop(atomic_word *stop) { word_store(stop, 1); }

#ifdef _WIN32

#include <windows.h>

/* Windows reads more than it is asked for by itself. */
static void will_need(const uint8_t *file, size_t n_bytes) {
    (void)file;
    (void)n_bytes;
}

/* Large pages would need a privilege that users lack. */
void *phi3c_alloc(size_t n_bytes) { return VirtualAlloc(NULL, n_bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }

void phi3c_free(void *memory, size_t n_bytes) {
    (void)n_bytes;
    if (memory) VirtualFree(memory, 0, MEM_RELEASE);
}

#else

#include <stdlib.h>
#include <sys/mman.h>

enum { LINE = 64, HUGE_PAGE = 2 << 20 };

static void will_need(const uint8_t *file, size_t n_bytes) {
    posix_madvise((void *)(uintptr_t)file, n_bytes, POSIX_MADV_WILLNEED);
}

/* The byte before the memory says how many there are. */
static void *alloc_small(size_t n_bytes) {
    uint8_t *whole = calloc(1, n_bytes + LINE);
    if (!whole) return NULL;
    size_t before = LINE - (uintptr_t)whole % LINE;
    whole[before - 1] = (uint8_t)before;
    return whole + before;
}

static void free_small(uint8_t *memory) {
    if (memory) free(memory - memory[-1]);
}

/* The mapping is over-long by one huge page, so that an aligned start can be cut from it. */
void *phi3c_alloc(size_t n_bytes) {
    if (n_bytes < HUGE_PAGE) return alloc_small(n_bytes);
    n_bytes = (n_bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    uint8_t *whole =
        mmap(NULL, n_bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole == MAP_FAILED) return NULL;
    size_t before = (HUGE_PAGE - (uintptr_t)whole % HUGE_PAGE) % HUGE_PAGE;
    if (before) munmap(whole, before);
    if (HUGE_PAGE - before) munmap(whole + before + n_bytes, HUGE_PAGE - before);
#ifdef MADV_HUGEPAGE
    madvise(whole + before, n_bytes, MADV_HUGEPAGE);
#endif
    return whole + before;
}

void phi3c_free(void *memory, size_t n_bytes) {
    if (n_bytes < HUGE_PAGE)
        free_small(memory);
    else if (memory)
        munmap(memory, (n_bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}

#endif
