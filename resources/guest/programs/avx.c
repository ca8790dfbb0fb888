// Keeps AVX registers busy across context switches and checks every result without vectors.
//
// usage: avx SEED; prints `avx: equal` and returns 0, or the first difference and 1.
#include <immintrin.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 400, LANES = 8, REGISTERS = 12 };

// A step of a linear congruential generator, the same in vectors and without.
static const uint32_t multiplier = 1664525, increment = 1013904223;

__attribute__((target("avx2"))) static void by_vectors(uint32_t state[REGISTERS][LANES])
{
    __m256i values[REGISTERS];
    const __m256i factor = _mm256_set1_epi32((int)multiplier);
    const __m256i summand = _mm256_set1_epi32((int)increment);
    for (int i = 0; i < REGISTERS; i++)
        values[i] = _mm256_loadu_si256((const __m256i *)state[i]);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < REGISTERS; i++) {
            values[i] = _mm256_add_epi32(_mm256_mullo_epi32(values[i], factor), summand);
            // Keeps the value in a register here, whatever the compiler thinks of it.
            __asm__ volatile("" : "+x"(values[i]));
        }
        if (round % 50 == 0)
            sched_yield();
    }
    for (int i = 0; i < REGISTERS; i++)
        _mm256_storeu_si256((__m256i *)state[i], values[i]);
}

__attribute__((optimize("no-tree-vectorize"))) static void by_scalars(uint32_t state[REGISTERS][LANES])
{
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < REGISTERS; i++)
            for (int lane = 0; lane < LANES; lane++)
                state[i][lane] = state[i][lane] * multiplier + increment;
}

int main(int argc, char **argv)
{
    if (!__builtin_cpu_supports("avx2")) {
        puts("avx: this processor has no AVX2");
        return 2;
    }
    uint32_t seed = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 0;
    for (int pass = 0; pass < 20; pass++) {
        uint32_t vectors[REGISTERS][LANES], scalars[REGISTERS][LANES];
        for (int i = 0; i < REGISTERS; i++)
            for (int lane = 0; lane < LANES; lane++)
                vectors[i][lane] = seed = seed * 22695477 + 1;
        // glibc copies and compares with the widest vectors that there are.
        memcpy(scalars, vectors, sizeof scalars);
        by_vectors(vectors);
        by_scalars(scalars);
        if (memcmp(vectors, scalars, sizeof scalars) != 0) {
            printf("avx: pass %d differs\n", pass);
            return 1;
        }
    }
    puts("avx: equal");
    return 0;
}
