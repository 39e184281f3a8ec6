// What a driver of linear_cpu.py is: a process that answers requests until its input ends, one line each, and has
// nothing to do in between. "about" asks who it is; "TYPE N K M THREADS SECONDS" for the seconds of one product of
// W[N, K] and M rows, over a turn of about so many SECONDS. Both are answered by one line.
#pragma once

#include <sys/prctl.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <string>

namespace awq::turns {

struct Request {
  std::string type;
  std::int64_t n, k, m;
  int threads;
  double seconds;
};

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Calls per second of `call`, which returns how many it made. What comes before 5 ms wakes threads and clocks and is
// not counted, unless it takes the whole turn.
template <class Call>
double rate(double seconds, Call call) {
  for (const double limit : {0.005, seconds}) {
    const double start = now();
    double calls = 0, passed = 0;
    while (passed < limit) calls += call(), passed = now() - start;
    if (passed >= seconds) return calls / passed;
  }
  return 0;
}

// answer(request) prints the rest of the line. A parent that stops this process between turns may die: so does it.
template <class Answer>
int serve(const char* about, Answer answer) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  char line[256], type[32];
  while (std::fgets(line, sizeof line, stdin)) {
    long n, k, m;
    int threads;
    double seconds;
    if (std::sscanf(line, "%31s %ld %ld %ld %d %lf", type, &n, &k, &m, &threads, &seconds) == 6) {
      answer(Request{type, n, k, m, threads, seconds});
    } else {
      std::printf("%s\n", about);
    }
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace awq::turns
