// SHA-256, FIPS 180-4.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace sparsekd::frozen {

class Sha256 {
 public:
  void update(const void* bytes, size_t size);
  std::string hex();  // of all bytes so far; the object is of no use afterwards

 private:
  void block(const unsigned char* bytes);

  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char waiting_[64];
  uint64_t length_ = 0;
};

}  // namespace sparsekd::frozen
