#include "core/frozen/json.h"

#include <algorithm>

#include "core/error.h"

namespace sparsekd::frozen {
namespace {

constexpr int kDeepest = 8;  // of objects and arrays in each other; the parser calls itself

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json all() {
    Json value = any(0);
    space();
    if (at_ != text_.size()) fail("the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* expected) const {
    throw ShapeError("header: expected " + std::string(expected) + " at byte " + std::to_string(at_));
  }
  int next() const { return at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : -1; }
  bool take(char c) {
    if (next() != static_cast<unsigned char>(c)) return false;
    ++at_;
    return true;
  }
  void space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos)
      ++at_;
  }

  Json any(int depth) {
    if (depth > kDeepest) fail("fewer levels");
    Json value;
    space();
    if (take('{')) {
      value.kind = Json::Kind::kObject;
      list('}', [&] {
        space();
        std::string key = string();
        space();
        if (!take(':')) fail("':'");
        value.members.emplace_back(std::move(key), any(depth + 1));
      });
      std::vector<std::string_view> keys;
      for (const auto& member : value.members) keys.push_back(member.first);
      std::sort(keys.begin(), keys.end());
      if (std::adjacent_find(keys.begin(), keys.end()) != keys.end()) fail("every key once");
    } else if (take('[')) {
      value.kind = Json::Kind::kArray;
      list(']', [&] { value.items.push_back(any(depth + 1)); });
    } else if (next() == '"') {
      value.kind = Json::Kind::kString;
      value.text = string();
    } else if (next() == '-' || digit()) {
      value.kind = Json::Kind::kNumber;
      value.number = number();
    } else {
      for (const std::string_view word : {"true", "false", "null"})
        if (text_.substr(at_, word.size()) == word) {
          at_ += word.size();
          return value;
        }
      fail("a value");
    }
    return value;
  }

  template <class F>
  void list(char end, F element) {
    space();
    if (take(end)) return;
    do {
      element();
      space();
    } while (take(','));
    if (!take(end)) fail("',' or an end");
  }

  bool digit() const { return next() >= '0' && next() <= '9'; }

  int64_t number() {
    const bool negative = take('-');
    if (!digit()) fail("a digit");
    const size_t first = at_;
    int64_t value = 0;
    for (; digit(); ++at_)
      if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, next() - '0', &value))
        fail("a number below 2^63");
    if (at_ - first > 1 && text_[first] == '0') fail("a number without leading zeros");
    if (next() == '.' || next() == 'e' || next() == 'E') fail("a whole number");
    return negative ? -value : value;
  }

  uint32_t hex() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const int c = next() | 0x20;
      if (digit())
        code = code * 16 + static_cast<uint32_t>(next() - '0');
      else if (c >= 'a' && c <= 'f')
        code = code * 16 + static_cast<uint32_t>(c - 'a') + 10;
      else
        fail("four hexadecimal digits");
    }
    return code;
  }

  std::string string() {
    if (!take('"')) fail("a string");
    std::string value;
    while (!take('"')) {
      if (next() < 0x20) fail("the end of a string");
      if (!take('\\')) {
        value += text_[at_++];
        continue;
      }
      constexpr std::string_view marks = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
      const size_t which = next() < 0 ? std::string_view::npos : marks.find(text_[at_]);
      if (which != std::string_view::npos) {
        value += meant[which];
        ++at_;
      } else if (take('u')) {
        const uint32_t code = hex();
        if (code >= 0x80) fail("an escape below 128");
        value += static_cast<char>(code);
      } else {
        fail("an escape");
      }
    }
    return value;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  const auto at = std::find_if(members.begin(), members.end(), [&](auto& m) { return m.first == key; });
  return at == members.end() ? nullptr : &at->second;
}

Json parse_json(std::string_view text) { return Parser(text).all(); }

}  // namespace sparsekd::frozen
