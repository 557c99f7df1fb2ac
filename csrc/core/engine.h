// The kernels of an op, of which each instruction set has its own.
//
// An op lists them in a struct, its table, with a member `template <Isa> static const Table compiled`. One
// source of the op includes engine.inl, holds the kernels and defines that member; CMakeLists.txt compiles it
// once for each instruction set. So a new op is one more source in SPARSEKD_ENGINES there, and a new
// instruction set one more row of flags there and one more case here. test_engines() compares the tables.
#pragma once
#include "core/cpu.h"

namespace sparsekd {

// The table of an instruction set; for the oracle, which has none, the generic one.
template <class Table>
const Table& engine(Isa isa = current_isa()) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return Table::template compiled<Isa::kAvx512>;
    case Isa::kAvx2:
      return Table::template compiled<Isa::kAvx2>;
#endif
    default:
      return Table::template compiled<Isa::kGeneric>;
  }
}

}  // namespace sparsekd
