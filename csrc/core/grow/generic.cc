#define SPARSEKD_ENGINE generic
#define SPARSEKD_VECTOR_BYTES 16
#include "core/grow/outer.inl"
#include "core/grow/scan.inl"
