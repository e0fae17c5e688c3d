// What the tests without Python share: a failed expectation is printed and counted; bfloat16 of inputs, cut off.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

inline float from_bfloat16(uint16_t x) { return __builtin_bit_cast(float, uint32_t{x} << 16); }
inline uint16_t to_bfloat16(float x) { return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x) >> 16); }
inline std::vector<uint16_t> in_bfloat16(const std::vector<float>& from) {
  std::vector<uint16_t> to;
  for (const float x : from) to.push_back(to_bfloat16(x));
  return to;
}
