#define SPARSEKD_ENGINE avx512
#define SPARSEKD_VECTOR_BYTES 64
#include "core/norm/engine.inl"
