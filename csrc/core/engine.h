// The kernels of an op, compiled for each instruction set.
//
// An op lists its kernels in a struct, the table, with a member `template <Isa> static const Table compiled`.
// One source of the op includes engine.inl, holds the kernels and defines that member; CMakeLists.txt
// compiles it for each instruction set. A new op therefore adds a source to SPARSEKD_ENGINES there. A new
// instruction set adds flags there, its name and the test for it to cpu.h and cpu.cc, and a case here. Tests:
// test_engines (core_tests.cc) checks that no two instruction sets share a table.
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
