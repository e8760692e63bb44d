// Angles without a C library: the last bit of its functions differs between machines.
#pragma once

namespace merge_engine {

// Within 2^-50 of the exact value, relatively. NaN where there is none. The error of sine and cosine holds for angles
// up to 2^20, and from 2^50 on they are NaN.
double arc_cosine(double x);
double sine(double angle);
double cosine(double angle);

}  // namespace merge_engine
