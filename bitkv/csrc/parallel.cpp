// Threads: torch's own OpenMP team, found at run time. Its workers spin for a while after each piece of
// work, so a second pool would fight with them for the cores.
#include <dlfcn.h>
#include <pthread.h>
#if defined(__linux__)
#include <link.h>
#endif

#include <atomic>
#include <exception>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

namespace bitkv {
namespace {

// The entry that compilers call for `#pragma omp parallel`; libomp and libiomp5 have it as well.
using Team = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

#if defined(__linux__)
int collect(dl_phdr_info* object, size_t, void* names) {
  const std::string name = object->dlpi_name;
  const size_t slash = name.rfind('/') + 1;  // 0 where there is none
  for (const char* runtime : {"libgomp", "libomp", "libiomp5"})
    if (name.compare(slash, std::string(runtime).size(), runtime) == 0)
      static_cast<std::vector<std::string>*>(names)->push_back(name);
  return 0;
}

Team find_team() {
  std::vector<std::string> names;
  dl_iterate_phdr(collect, &names);
  // several may be loaded: torch's own lies in torch/lib
  for (const bool torch : {true, false})
    for (const std::string& name : names) {
      if ((name.find("/torch/") != std::string::npos) != torch) continue;
      if (void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD))
        if (void* entry = dlsym(library, "GOMP_parallel")) return reinterpret_cast<Team>(entry);
    }
  return nullptr;
}
#else
Team find_team() { return nullptr; }
#endif

// A child of fork has none of the team's threads, and an OpenMP runtime would wait for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Work {
  void (*body)(void*, int);
  void* context;
  int items;
  std::atomic<int> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;

  void run() noexcept {
    try {
      for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next.store(items, std::memory_order_relaxed);
    }
  }
  static void run(void* work) { static_cast<Work*>(work)->run(); }
};

void run_on_new_threads(Work& work, int threads) {
  std::vector<std::thread> others;
  others.reserve(size_t(threads - 1));
  try {
    while (int(others.size()) < threads - 1) others.emplace_back([&work] { work.run(); });
  } catch (const std::system_error&) {
    // as many as the system gives
  }
  work.run();
  for (std::thread& other : others) other.join();
}

}  // namespace

void parallel_for(int items, int threads, void (*body)(void*, int), void* context) {
  threads = threads < items ? threads : items;
  if (threads <= 1) {
    for (int i = 0; i < items; ++i) body(context, i);
    return;
  }
  Work work{body, context, items};
  static const Team team = find_team();
  if (team && !forked)
    team(Work::run, &work, unsigned(threads), 0);
  else
    run_on_new_threads(work, threads);
  if (work.error) std::rethrow_exception(work.error);
}

}  // namespace bitkv
