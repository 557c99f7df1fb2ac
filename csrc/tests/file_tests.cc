// Files of frozen networks: SHA-256 and JSON against known answers, and whatever is done to a file, it gives
// a network or one of core's errors.
#include <cstring>
#include <map>

#include "core/frozen/file.h"
#include "core/frozen/json.h"
#include "core/frozen/sha256.h"
#include "tests/harness.h"

using namespace sparsekd;
using namespace sparsekd::frozen;

namespace {

std::string digest(const std::string& text, size_t step) {
  Sha256 hash;
  for (size_t at = 0; at < text.size(); at += step)
    hash.update(text.data() + at, std::min(step, text.size() - at));
  return hash.hex();
}

void test_sha256() {
  check(digest("", 1) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "sha256 of ''");
  check(digest("abc", 2) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "sha256 of abc");
  const std::string million(1000000, 'a');
  for (const size_t step : {1, 63, 64, 65, 1000})
    check(digest(million, step) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
          "sha256 of a million");
  // Around the ends of a block: the padding takes another one or not.
  for (size_t size = 50; size < 70; ++size)
    check(digest(million.substr(0, size), 1) == digest(million.substr(0, size), 64), "sha256 in pieces");
}

void test_json() {
  const Json all =
      parse_json(" { \"a\\\"\\n\\u0041\" : [1, -2, 0, []] , \"b\":{\"c\":true}, \"d\" : null}\n");
  check(all.members.size() == 3 && all.members[0].first == "a\"\nA", "json: keys");
  check(all.find("a\"\nA")->items[1].number == -2, "json: numbers");
  check(all.find("b")->find("c") && !all.find("c") && !all.find("d")->find("x"), "json: find");
  check(parse_json("9223372036854775807").number == INT64_MAX, "json: the largest number");
  for (const char* wrong : {"",
                            " ",
                            "{",
                            "[",
                            "[1",
                            "[1,",
                            "[1,]",
                            "[,1]",
                            "{}x",
                            "{\"a\"}",
                            "{\"a\":}",
                            "{\"a\":1,}",
                            "{a:1}",
                            "{\"a\":1,\"a\":2}",
                            "01",
                            "-",
                            "1.5",
                            "1e3",
                            "9223372036854775808",
                            "\"",
                            "\"\\",
                            "\"\\x\"",
                            "\"\\u12\"",
                            "\"\\u00e9\"",
                            "\"\n\"",
                            "tru",
                            "nan",
                            "[[[[[[[[[[]]]]]]]]]]",
                            "\xff"})
    check_throws<ShapeError>([&] { parse_json(wrong); }, "header: expected");
  check_throws<ShapeError>([&] { parse_json(std::string(100000, '[')); }, "levels");
}

// What a file is made of, to be written after something was done to it.
struct Parts {
  std::map<std::string, std::vector<float>> floats;
  std::map<std::string, std::vector<int32_t>> numbers;
  int64_t columns = kRecord;  // of the records
  std::string inputs = "[[2, 5, 4]]", output = "[3, 5, 4]";
};

template <class T>
void append(std::string& header, std::string& data, const std::string& name, const std::vector<T>& list,
            int64_t columns, std::map<std::string, std::string>& hashed) {
  const bool whole = std::is_same_v<T, int32_t>;
  const std::string count = std::to_string(list.size());
  const std::string rows = std::to_string(list.size() / std::max<int64_t>(columns, 1));
  const std::string shape = columns ? rows + ", " + std::to_string(columns) : count;
  const size_t begin = data.size();
  data.append(reinterpret_cast<const char*>(list.data()), list.size() * sizeof(T));
  header += ",\"" + name + "\":{\"dtype\":\"" + (whole ? "I32" : "F32") + "\",\"shape\":[" + shape +
            "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(data.size()) + "]}";
  hashed[name] = name + (whole ? "|torch.int32|(" : "|torch.float32|(") + shape + (columns ? ")|" : ",)|") +
                 data.substr(begin);
}

std::string written(const Parts& parts) {
  std::string header, data;
  std::map<std::string, std::string> hashed;
  for (const auto& [name, list] : parts.numbers)
    append(header, data, name, list, name == "records" ? parts.columns : 0, hashed);
  for (const auto& [name, list] : parts.floats) append(header, data, name, list, 0, hashed);
  std::string all;
  for (const auto& [name, text] : hashed) all += text;
  header = R"({"__metadata__":{"sparsekd":"{\"format\": \"sparsekd frozen 1\", \"inputs\": )" + parts.inputs +
           ", \\\"output\\\": " + parts.output + ", \\\"sha256\\\": \\\"" + digest(all, 1 << 20) +
           "\\\"}\"}" + header + "}";
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i) file[i] = static_cast<char>(header.size() >> 8 * i);
  return file + header + data;
}

// A convolution and a pointwise node.
Parts example() {
  Parts parts;
  parts.numbers["records"] = {0, 0, 0, -1, -1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 2, 5, 4,   // input
                              2, 1, 0, 0,  -1, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0,   // product
                              3, 1, 0, 1,  -1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0};  // pointwise
  parts.numbers["outputs"] = {2};
  parts.numbers["1.crow"] = {0, 2, 2, 4};
  parts.numbers["1.col"] = {0, 13, 4, 17};
  parts.floats["1.values"] = {0.5f, 2, -1, 3};
  parts.floats["1.bias"] = {0, 1, 0.5f};
  parts.floats["2.scale"] = {1, 2, 3};
  parts.floats["2.bias"] = {0, 0, 1};
  return parts;
}

// 1 if the file gives a network, which then computes something.
int runs(const std::string& bytes) {
  try {
    const File file = read_file(bytes);
    std::vector<std::vector<float>> memory;
    std::vector<const float*> in;
    std::vector<float*> out;
    for (size_t i = 0; i < file.inputs.size(); ++i)
      memory.emplace_back(2 * file.network->input_length(i), 1.0f);
    for (const auto& input : memory) in.push_back(input.data());
    std::vector<std::vector<float>> results;
    for (size_t i = 0; i < file.outputs.size(); ++i) results.emplace_back(2 * file.network->output_length(i));
    for (auto& result : results) out.push_back(result.data());
    file.network->run(in, out, 2, 1);
    return 1;
  } catch (const ShapeError& e) {
    check(*e.what() != 0, "a refused file has a message");
  } catch (const TopologyError& e) {
    check(*e.what() != 0, "a refused file has a message");
  }
  return 0;
}

void test_refused() {
  check(runs(written(example())) == 1, "file: an example runs");
  const auto refuse = [&](auto spoil, const char* text) {
    Parts parts = example();
    spoil(parts);
    check_throws<std::invalid_argument>([&] { read_file(written(parts)); }, text);
  };
  refuse([](Parts& p) { p.numbers.erase("records"); }, "no records");
  refuse([](Parts& p) { p.columns = 3; }, "records: expected rows of 17");
  refuse([](Parts& p) { p.numbers["records"].clear(); }, "not a tensor");
  refuse([](Parts& p) { p.numbers["1.col"][3] = 18; }, "node 1: ");
  refuse([](Parts& p) { p.floats["1.col"] = {1}, p.numbers.erase("1.col"); }, "another type");
  refuse([](Parts& p) { p.floats["3.values"] = {1}; }, "3.values: not a tensor");
  refuse([](Parts& p) { p.floats["01.values"] = {1}; }, "01.values: not a tensor");
  refuse([](Parts& p) { p.floats["1"] = {1}; }, "1: not a tensor");
  refuse([](Parts& p) { p.floats["1.rest"] = {1}; }, "1.rest: not a tensor");
  refuse([](Parts& p) { p.inputs = "[[2, 5, 5]]"; }, "inputs: not the network's");
  refuse([](Parts& p) { p.inputs = "[]"; }, "a shape for every");
  refuse([](Parts& p) { p.inputs = "[[40]"; }, "header: expected");
  refuse([](Parts& p) { p.output = "[3, -20]"; }, "output: expected whole numbers");
  refuse([](Parts& p) { p.output = "60"; }, "no output");
  const std::string good = written(example());
  for (const size_t size : {size_t{0}, size_t{7}, size_t{8}, size_t{100}, good.size() - 1})
    check_throws<ShapeError>([&] { read_file(good.substr(0, size)); }, "");
  check_throws<ShapeError>([&] { read_file(good + "x"); }, "no tensor");
  std::string other = good;
  other[good.size() - 1] ^= 1;
  check_throws<ShapeError>([&] { read_file(other); }, "damaged");
}

void test_mutations() {
  const std::string good = written(example());
  int ran = 0;
  for (int i = 0; i < 4000; ++i) {
    std::string bytes = good;
    if (i % 2) {
      Parts parts = example();  // with a hash that fits, as somebody with intent would
      for (int64_t changes = pick(1, 3); changes > 0; --changes) {
        auto at = parts.numbers.begin();
        std::advance(at, pick(0, static_cast<int64_t>(parts.numbers.size()) - 1));
        const int32_t values[] = {-1, 0, 1, 2, 5, 7, 1024, 1 << 30, INT32_MAX, INT32_MIN};
        if (!at->second.empty())
          at->second[pick(0, static_cast<int64_t>(at->second.size()) - 1)] = values[pick(0, 9)];
        if (pick(0, 9) == 0) at->second.resize(pick(0, static_cast<int64_t>(at->second.size())));
      }
      bytes = written(parts);
    }
    for (int64_t changes = i % 2 ? 0 : pick(1, 4); changes > 0; --changes)
      bytes[pick(0, static_cast<int64_t>(bytes.size()) - 1)] = static_cast<char>(pick(0, 255));
    if (pick(0, 9) == 0) bytes.resize(pick(0, static_cast<int64_t>(bytes.size())));
    ran += runs(bytes);
  }
  check(ran < 2000, "most mutations are refused");
}

}  // namespace

void test_files() {
  test_sha256();
  test_json();
  test_refused();
  test_mutations();
}
