#define SPARSEKD_PEAK_LOOPS peak_loops_generic
#define SPARSEKD_VECTOR_BYTES 16
#include "core/peak/loops.inl"
