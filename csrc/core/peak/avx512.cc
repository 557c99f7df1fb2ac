#define SPARSEKD_PEAK_LOOPS peak_loops_avx512
#define SPARSEKD_VECTOR_BYTES 64
#include "core/peak/loops.inl"
