#define SPARSEKD_ENGINE avx512
#define SPARSEKD_VECTOR_BYTES 64
#include "core/grow/outer.inl"
#include "core/grow/scan.inl"
