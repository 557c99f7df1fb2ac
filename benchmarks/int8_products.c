// Would maps of int8 make sparse products faster? A block of 32 channels that fits L1, 3x3 kernels, 256 rows
// with nonzeros at random, a tile of 8 vectors: float32 with a multiply-add for each nonzero and vector,
// against int8 with four channels to an instruction (vpdpbusd) wherever one of the four has a nonzero, and
// results rounded to bytes. One thread; the least of 300 runs.
//
//     gcc -O3 -march=native benchmarks/int8_products.c -o int8_products && ./int8_products
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { kTile = 8, kWidth = kTile + 2, kChannels = 32, kTaps = 9, kRows = 256, kLine = 64 };

typedef struct {
  int32_t offset;  // in bytes, of the first vector of the input
  union {
    float value;
    int32_t four;
  };
} Entry;

typedef struct {
  Entry* list;
  int counts[kRows];
  long total;
} Lists;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

__attribute__((noinline)) static void float_rows(const char* in, const Lists* of, float* out) {
  const Entry* entry = of->list;
  for (int row = 0; row < kRows; ++row, out += 16 * kTile) {
    __m512 sum[kTile];
    for (int i = 0; i < kTile; ++i) sum[i] = _mm512_set1_ps(0.5f);
    for (int left = of->counts[row]; left > 0; --left, ++entry) {
      const __m512 weight = _mm512_set1_ps(entry->value);
      for (int i = 0; i < kTile; ++i)
        sum[i] = _mm512_fmadd_ps(_mm512_loadu_ps(in + entry->offset + i * kLine), weight, sum[i]);
    }
    for (int i = 0; i < kTile; ++i)
      _mm512_storeu_ps(out + 16 * i, _mm512_max_ps(sum[i], _mm512_setzero_ps()));
  }
}

__attribute__((noinline)) static void int8_rows(const char* in, const Lists* of, char* out) {
  const Entry* entry = of->list;
  for (int row = 0; row < kRows; row += 4, out += kLine * kTile) {
    __m512i bytes[kTile];
    for (int i = 0; i < kTile; ++i) bytes[i] = _mm512_setzero_si512();
    for (int r = 0; r < 4; ++r) {
      __m512i sum[kTile];
      for (int i = 0; i < kTile; ++i) sum[i] = _mm512_setzero_si512();
      for (int left = of->counts[row + r]; left > 0; --left, ++entry) {
        const __m512i weight = _mm512_set1_epi32(entry->four);
        for (int i = 0; i < kTile; ++i)
          sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_loadu_si512(in + entry->offset + i * kLine), weight);
      }
      for (int i = 0; i < kTile; ++i) {
        __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), _mm512_set1_ps(0.01f), _mm512_set1_ps(0.5f));
        y = _mm512_max_ps(y, _mm512_setzero_ps());
        const __m512i code = _mm512_min_epi32(_mm512_cvtps_epi32(y), _mm512_set1_epi32(255));
        bytes[i] = _mm512_or_si512(bytes[i], _mm512_slli_epi32(code, 8 * r));
      }
    }
    for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(out + i * kLine, bytes[i]);
  }
}

// Lists of the vectors in which one of `together` channels has a nonzero.
static Lists lists(const char* mask, int together) {
  Lists made = {malloc(sizeof(Entry) * kRows * kChannels * kTaps), {0}, 0};
  for (int row = 0; row < kRows; ++row)
    for (int group = 0; group < kChannels / together; ++group)
      for (int tap = 0; tap < kTaps; ++tap) {
        int any = 0;
        for (int c = 0; c < together; ++c)
          any |= mask[(row * kChannels + group * together + c) * kTaps + tap];
        if (!any) continue;
        Entry* const entry = &made.list[made.total++];
        entry->offset = ((group * 3 + tap / 3) * kWidth + tap % 3) * kLine;
        if (together == 1)
          entry->value = 0.5f;
        else
          entry->four = 0x01010101;
        ++made.counts[row];
      }
  return made;
}

int main(void) {
  const size_t size = kChannels * 3 * kWidth * kLine, results = kRows * kTile * kLine;
  char* const in = aligned_alloc(kLine, size);
  char* const out = aligned_alloc(kLine, results);
  char* const mask = malloc(kRows * kChannels * kTaps);
  memset(in, 1, size);
  for (int percent = 30; percent >= 5; percent = percent == 30 ? 20 : percent / 2) {
    srand(1);
    for (int k = 0; k < kRows * kChannels * kTaps; ++k) mask[k] = rand() % 100 < percent;
    const Lists ones = lists(mask, 1), fours = lists(mask, 4);
    double best[2] = {1e9, 1e9};
    for (int run = 0; run < 300; ++run) {
      const double begin = now();
      float_rows(in, &ones, (float*)out);
      const double middle = now();
      int8_rows(in, &fours, out);
      const double end = now();
      if (middle - begin < best[0]) best[0] = middle - begin;
      if (end - middle < best[1]) best[1] = end - middle;
    }
    printf(
        "density %2d %%: %.2f ns a multiply-add of a vector, %.2f instructions of int8 a nonzero, %.2f times "
        "faster\n",
        percent, best[0] * 1e9 / ones.total / kTile, (double)fours.total / ones.total, best[0] / best[1]);
    free(ones.list);
    free(fours.list);
  }
  return 0;
}
