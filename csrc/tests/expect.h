// What the tests without Python share: a failed expectation is printed and counted.
#pragma once

#include <cstdio>
#include <string>

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}
