#define SPARSEKD_ENGINE avx2
#define SPARSEKD_VECTOR_BYTES 32
#include "core/norm/engine.inl"
