/* SPDX-License-Identifier: MIT */
/* x86: CPUID and XGETBV, as the vendors' manuals define them. ARM: what the operating system says, since a program may
 * not ask the processor. */
#include "cpu.h"

#include <stdint.h>
#include <string.h>

#include "phi3c.h"

static char features[256];

static void found(const char *name) {
    if (features[0]) strcat(features, " ");
    strcat(features, name);
}

#if defined(__x86_64__) || defined(_M_X64)

#if defined(_MSC_VER) && !defined(__clang__)
#include <immintrin.h>
#include <intrin.h>
static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) { __cpuidex((int *)r, (int)leaf, (int)subleaf); }
static uint64_t xgetbv0(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) {
    __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
}
static uint64_t xgetbv0(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}
#endif

unsigned phi3c_cpu_flags(void) {
    enum { EAX, EBX, ECX, EDX };
    uint32_t leaf0[4], leaf1[4], leaf7[4] = {0}, leaf7_1[4] = {0};
    unsigned flags = 0;
    features[0] = 0;
    cpuid(0, 0, leaf0);
    cpuid(1, 0, leaf1);
    if (leaf0[EAX] >= 7) cpuid(7, 0, leaf7);
    if (leaf7[EAX] >= 1) cpuid(7, 1, leaf7_1);

    int osxsave = leaf1[ECX] >> 27 & 1;
    uint64_t saved = osxsave ? xgetbv0() : 0;
    int ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;

    const struct {
        const char *name;
        uint32_t word;
        int bit, state; /* state: registers the system has to save */
    } table[] = {
        {"ssse3", leaf1[ECX], 9, 1},       {"sse4.2", leaf1[ECX], 20, 1},     {"fma", leaf1[ECX], 12, ymm},
        {"f16c", leaf1[ECX], 29, ymm},     {"avx", leaf1[ECX], 28, ymm},      {"avx2", leaf7[EBX], 5, ymm},
        {"bmi2", leaf7[EBX], 8, 1},        {"avx512f", leaf7[EBX], 16, zmm},  {"avx512dq", leaf7[EBX], 17, zmm},
        {"avx512bw", leaf7[EBX], 30, zmm}, {"avx512vl", leaf7[EBX], 31, zmm}, {"avx512vnni", leaf7[ECX], 11, zmm},
        {"avxvnni", leaf7_1[EAX], 4, ymm},
    };
    unsigned have = 0;
    for (unsigned i = 0; i < sizeof table / sizeof *table; i++)
        if ((table[i].word >> table[i].bit & 1) && table[i].state) {
            have |= 1u << i;
            found(table[i].name);
        }
#ifdef __APPLE__ /* macOS on Intel saves zmm state lazily, and once corrupted it */
    const int zmm_is_safe = 0;
#else
    const int zmm_is_safe = 1;
#endif
    const unsigned avx2 = 0x007c, avx512 = 0x0f80, avxvnni = 0x1000; /* rows 2-6; rows 7-11; row 12 */
    if ((have & avx2) == avx2) flags |= CPU_AVX2;
    if ((flags & CPU_AVX2) && (have & avxvnni)) flags |= CPU_AVXVNNI;
    if ((flags & CPU_AVX2) && (have & avx512) == avx512 && zmm_is_safe) flags |= CPU_AVX512;
    int is_amd = leaf0[EBX] == 0x68747541; /* "Auth", of AuthenticAMD */
    if (is_amd && (leaf1[EAX] >> 8 & 15) + (leaf1[EAX] >> 20 & 255) == 0x19) flags |= CPU_ZEN4;
    return flags;
}

#elif defined(__aarch64__) || defined(_M_ARM64)

#if defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; } /* HWCAP_ASIMDDP, which old headers lack */
#elif defined(__APPLE__)
#include <sys/sysctl.h>
static int has_dotprod(void) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, NULL, 0) == 0 && value;
}
#elif defined(_WIN32)
#include <windows.h>
static int has_dotprod(void) { return IsProcessorFeaturePresent(43); } /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */
#else
static int has_dotprod(void) { return 0; }
#endif

unsigned phi3c_cpu_flags(void) {
    features[0] = 0;
    found("neon");
    if (!has_dotprod()) return 0;
    found("dotprod");
    return CPU_DOTPROD;
}

#else

unsigned phi3c_cpu_flags(void) {
    features[0] = 0;
    return 0;
}

#endif

const char *phi3c_cpu_features(void) { return features; }
