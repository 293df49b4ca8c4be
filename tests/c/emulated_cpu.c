/* SPDX-License-Identifier: MIT */
/* In the place of csrc/cpu.c when instruction sets are emulated: a processor with every rung of the ladder. */
#include "../../csrc/cpu.h"

unsigned phi3c_cpu_flags(void) { return CPU_AVX2 | CPU_AVXVNNI | CPU_AVX512; }
const char *phi3c_cpu_features(void) { return "emulated"; }
