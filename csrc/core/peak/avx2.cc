#define SPARSEKD_PEAK_LOOPS peak_loops_avx2
#define SPARSEKD_VECTOR_BYTES 32
#include "core/peak/loops.inl"
