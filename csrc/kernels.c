/* SPDX-License-Identifier: MIT */
/* The ladder of instruction sets, and which rung is in use. */
#include "kernels.h"

#include "cpu.h"

phi3c_kernels phi3c_kernel;
int phi3c_fetch_ahead;

/* Worst first; needs: flags of cpu.h. */
static const struct {
    const phi3c_kernels *kernels;
    unsigned needs;
} ladder[] = {
    {&phi3c_kernels_scalar, 0},
#if defined(__x86_64__) || defined(_M_X64)
    {&phi3c_kernels_avx2, CPU_AVX2},
    {&phi3c_kernels_avxvnni, CPU_AVXVNNI},
    {&phi3c_kernels_avx512, CPU_AVX512},
#elif defined(__aarch64__) || defined(_M_ARM64)
    {&phi3c_kernels_neon, 0},
    {&phi3c_kernels_dotprod, CPU_DOTPROD},
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

/* What the rung has takes the place of what is there. */
static void take(phi3c_kernels *all, const phi3c_kernels *rung) {
    all->name = rung->name;
    for (int type = 0; type < PHI3C_N_TYPES; type++) {
        if (rung->tile[type]) all->tile[type] = rung->tile[type];
        if (rung->pair[type]) all->pair[type] = rung->pair[type];
        if (rung->attend_tile[type]) all->attend_tile[type] = rung->attend_tile[type];
    }
    if (rung->quantize_row) all->quantize_row = rung->quantize_row;
    if (rung->rms_norm_row) all->rms_norm_row = rung->rms_norm_row;
    if (rung->silu_mul_row) all->silu_mul_row = rung->silu_mul_row;
    if (rung->to_f16) all->to_f16 = rung->to_f16;
    if (rung->peak) all->peak = rung->peak;
}

int phi3c_init(const char *isa) {
    phi3c_kernels kernels = {0};
    int chosen = -1;
    for (int i = 0; available(i); i++)
        if (!isa || strcmp(isa, available(i)->name) == 0) chosen = i;
    if (chosen < 0) return -1;
    for (int i = 0; i <= chosen; i++) take(&kernels, available(i));
    phi3c_kernel = kernels;
    phi3c_fetch_ahead = !(phi3c_cpu_flags() & CPU_ZEN4); /* whose prefetchers are slower where a program asks too */
    return 0;
}

const char *phi3c_isa(void) { return phi3c_kernel.name; }
