#define SPARSEKD_ENGINE generic
#define SPARSEKD_VECTOR_BYTES 16
#include "core/norm/engine.inl"
