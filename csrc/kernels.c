/* SPDX-License-Identifier: MIT */
/* The ladder of instruction sets, and which rung is in use. */
#include "kernels.h"

#include "cpu.h"

phi3c_kernels phi3c_kernel;

/* Worst first; needs: flags of cpu.h. */
static const struct {
    const phi3c_kernels *kernels;
    unsigned needs;
} ladder[] = {
    {&phi3c_kernels_scalar, 0},
#if defined(__x86_64__) || defined(_M_X64)
    {&phi3c_kernels_avx2, CPU_AVX2},
    {&phi3c_kernels_avx512, CPU_AVX512},
#endif
};
enum { RUNGS = sizeof ladder / sizeof *ladder };

static const phi3c_kernels *available(int i) {
    unsigned flags = phi3c_cpu_flags();
    for (int rung = 0; rung < RUNGS; rung++)
        if ((flags & ladder[rung].needs) == ladder[rung].needs && i-- == 0) return ladder[rung].kernels;
    return NULL;
}

const char *phi3c_available_isa(int i) {
    const phi3c_kernels *kernels = available(i);
    return kernels ? kernels->name : NULL;
}

int phi3c_init(const char *isa) {
    const phi3c_kernels *best = NULL;
    for (int i = 0; available(i); i++)
        if (!isa || strcmp(isa, available(i)->name) == 0) best = available(i);
    if (!best) return -1;
    phi3c_kernel = *best;
    return 0;
}

const char *phi3c_isa(void) { return phi3c_kernel.name; }
