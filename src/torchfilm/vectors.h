// Rows of float32 numbers, a vector at a time: what kernels.cpp is made of.
//
// A loop over a row of 4, 8, 16 or 49 numbers that is left to the compiler ends in a sum across its lanes, and in what
// fits no vector, number by number: both take longer than the row. Here the sums of many rows are taken together, and
// the last vector of a row overlaps with the one before it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace torchfilm {

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // numbers that the processor takes at once
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int64_t kBlock = 2048;  // numbers summed in one go; then their sums are added

// `lanes` neighbouring numbers, wherever they lie. Compilers let a vector be read where its numbers were written.
template <int lanes>
struct Vector {
  typedef float Numbers __attribute__((vector_size(4 * lanes), aligned(4)));
  typedef int32_t Places __attribute__((vector_size(4 * lanes)));
};

template <int lanes>
using Numbers = typename Vector<lanes>::Numbers;

template <int lanes>
inline Numbers<lanes> loaded(const float* from) {
  return *reinterpret_cast<const Numbers<lanes>*>(from);
}

template <int lanes>
inline void stored(Numbers<lanes> numbers, float* to) {
  *reinterpret_cast<Numbers<lanes>*>(to) = numbers;
}

#if defined(__clang__)
#define TORCHFILM_PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TORCHFILM_PICKED(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

// Of each run of lanes: the two halves of a's added, then those of b's. Lanes of b are counted behind those of a.
template <int lanes, int run, int... lane>
inline Numbers<lanes> halved(Numbers<lanes> a, Numbers<lanes> b, std::integer_sequence<int, lane...>) {
  using Places [[maybe_unused]] = typename Vector<lanes>::Places;
  constexpr int half = run / 2;
  return TORCHFILM_PICKED(a, b, (lane % run < half ? lane : lane - half + lanes)...) +
         TORCHFILM_PICKED(a, b, (lane % run < half ? lane + half : lane + lanes)...);
}

template <int lanes, int run>
inline Numbers<lanes> halved(Numbers<lanes> a, Numbers<lanes> b) {
  return halved<lanes, run>(a, b, std::make_integer_sequence<int, lanes>());
}

// The sums of `number` vectors, in their order, each in lanes / number lanes. Of one vector alone each addition would
// wait for the one before.
template <int lanes, int number, int run = lanes>
inline Numbers<lanes> sums_of(Numbers<lanes>* each) {
  if constexpr (run == 1) {
    return each[0];
  } else if constexpr (number == 1) {
    each[0] = halved<lanes, run>(each[0], each[0]);
    return sums_of<lanes, 1, run / 2>(each);
  } else {
    for (int i = 0; i < number / 2; ++i) each[i] = halved<lanes, run>(each[i], each[i + number / 2]);
    return sums_of<lanes, number / 2, run / 2>(each);
  }
}

// Calls f with the lanes that fit rows of so many numbers, and their number where it is one vector: 0 is any other.
template <int lanes = kLanes, typename F>
inline void by_lanes(int64_t inner, F f) {
  if constexpr (lanes < 4) {
    f.template operator()<1, 0>();
  } else {
    if (inner == lanes) return f.template operator()<lanes, lanes>();
    if (inner > lanes) return f.template operator()<lanes, 0>();
    by_lanes<lanes / 2>(inner, f);
  }
}

template <int lanes>
struct Two {
  Numbers<lanes> first, second;
};

// Of up to `number` rows: the two sums over the vectors that f(row, i) makes of a row's numbers from i on. The last
// vector of a row may overlap with the one before, or begin in front of a row that is shorter: of it, what is new is
// counted. Where vectors are short, several sums go on side by side, because one waits for its last addition.
template <int lanes, int number, typename F>
inline void sums_of_rows(int64_t rows, int64_t inner, float* first, float* second, F f) {
  constexpr int chains = lanes == kLanes ? 16 / lanes : 1;
  const int64_t full = inner / lanes * lanes;
  typename Vector<lanes>::Places fresh{};
  for (int i = 0; i < lanes; ++i) fresh[i] = i >= lanes - (inner - full) ? -1 : 0;
  Numbers<lanes> firsts[number], seconds[number];
  for (int64_t row = 0; row < number; ++row) {
    Numbers<lanes> a[chains]{}, b[chains]{};
    const auto count = [&](int chain, int64_t i) __attribute__((always_inline)) {
      const Two<lanes> found = f(row, i);
      a[chain] += found.first;
      b[chain] += found.second;
    };
    if (row < rows) {
      int64_t i = 0;
      for (; i + chains * lanes <= full; i += chains * lanes)
        for (int chain = 0; chain < chains; ++chain) count(chain, i + chain * lanes);
      for (; i < full; i += lanes) count(0, i);
      if (full < inner) {
        const Two<lanes> found = f(row, inner - lanes);
        a[0] += fresh ? found.first : Numbers<lanes>{};
        b[0] += fresh ? found.second : Numbers<lanes>{};
      }
    }
    for (int chain = 1; chain < chains; ++chain) {
      a[0] += a[chain];
      b[0] += b[chain];
    }
    firsts[row] = a[0];
    seconds[row] = b[0];
  }
  const Numbers<lanes> a = sums_of<lanes, number>(firsts), b = sums_of<lanes, number>(seconds);
  if (number == lanes && rows == lanes) {
    stored<lanes>(a, first);
    stored<lanes>(b, second);
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    first[row] = a[row * (lanes / number)];
    second[row] = b[row * (lanes / number)];
  }
}

// The same of any number of rows of inner >= lanes numbers; the sums of blocks are added in double.
template <int lanes, typename F>
inline void row_sums(int64_t rows, int64_t inner, float* first, float* second, F f) {
  for (int64_t row = 0; inner > kBlock && row < rows; ++row) {
    double a = 0.0, b = 0.0;
    for (int64_t block = 0; block < inner; block += kBlock) {
      float c = 0.0f, d = 0.0f;
      sums_of_rows<lanes, 1>(1, std::min(kBlock, inner - block), &c, &d,
                             [&](int64_t, int64_t i) __attribute__((always_inline)) { return f(row, block + i); });
      a += c;
      b += d;
    }
    first[row] = static_cast<float>(a);
    second[row] = static_cast<float>(b);
  }
  if (inner > kBlock) return;
  constexpr int few = std::min(lanes, 4);
  int64_t start = 0;
  const auto own = [&](int64_t row, int64_t i) __attribute__((always_inline)) { return f(start + row, i); };
  for (; start + lanes <= rows; start += lanes)
    sums_of_rows<lanes, lanes>(lanes, inner, first + start, second + start, own);
  for (; start < rows; start += few)
    sums_of_rows<lanes, few>(std::min<int64_t>(few, rows - start), inner, first + start, second + start, own);
}

// The sum of f(n) for all numbers n: in float over a block, in double over the blocks. In as many vectors as hold 32
// numbers, because one waits for its last addition, and with more some processors foresee less.
template <typename F>
inline double summed(const float* from, int64_t count, F f) {
  constexpr int chains = 32 / kLanes;
  double total = 0.0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = std::min(count, start + kBlock);
    Numbers<kLanes> sums[chains]{};
    int64_t i = start;
    for (; i + 32 <= end; i += 32)
      for (int chain = 0; chain < chains; ++chain) sums[chain] += f(loaded<kLanes>(from + i + chain * kLanes));
    for (; i + kLanes <= end; i += kLanes) sums[0] += f(loaded<kLanes>(from + i));
    float rest = 0.0f;
    for (; i < end; ++i) rest += f(from[i]);
    for (int chain = 1; chain < chains; ++chain) sums[0] += sums[chain];
    total += sums_of<kLanes, 1>(sums)[0] + rest;
  }
  return total;
}

}  // namespace torchfilm
