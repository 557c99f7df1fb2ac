// JSON as headers of files have it: objects, arrays, strings and whole numbers, from bytes nobody has
// checked.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sparsekd::frozen {

// A value; what it is not is empty. Fractions, exponents and equal keys are refused, true, false and null
// are kOther.
struct Json {
  enum class Kind { kObject, kArray, kString, kNumber, kOther };
  Kind kind = Kind::kOther;
  int64_t number = 0;
  std::string text;
  std::vector<Json> items;                            // of an array
  std::vector<std::pair<std::string, Json>> members;  // of an object, in the file's order

  const Json* find(std::string_view key) const;  // null if there is none, or this is no object
};

// Throws ShapeError with the position of what is no JSON.
Json parse_json(std::string_view text);

}  // namespace sparsekd::frozen
