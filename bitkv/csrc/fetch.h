// Pages on their way into the second-level cache, while those before them are multiplied.
//
// Memory brings a core only as many bytes as the core is waiting for at a time. A prefetch that goes all the way to
// memory holds one of a few buffers (16 in an Intel core of today) until its line is there, and whatever misses the
// first-level cache meanwhile, the codes at hand among it, has to find a free one. The hardware's own prefetcher has
// places of its own, but stays within 4 KB and wants to see lines in order. So lines are asked for evenly, not only
// while codes are multiplied, and in up to four streams, each in order and in a 4 KB of its own: the hardware runs ahead of all
// of them, and a prefetch finds its line under way.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

// In assembly where it can be, because GCC moves its own away from where it was asked for.
inline void prefetch(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

// How fast lines are asked for.
struct Pace {
  static constexpr int kUnit = 64;
  int step = 0;   // for each step of a loop over codes, in 1 / kUnit lines
  int pause = 0;  // in lines, before the work between such loops

  // For so many lines, steps and pauses a page. Three fifths go to the loops, which take about as much of the time.
  static Pace of(size_t lines, int64_t steps, int pauses) {
    const float share = !steps ? 0 : pauses ? 0.6f : 1;
    Pace pace;
    if (steps) pace.step = int(share * kUnit * float(lines) / float(steps)) + 1;
    if (pauses) pace.pause = int((1 - share) * float(lines) / float(pauses)) + 1;
    return pace;
  }
};

class Fetch {
 public:
  // `count` pages: as many at once as there are streams, or one in parts.
  Fetch(const uint8_t* const* pages, int count, size_t bytes, Pace pace)
      : pages_(pages), count_(count), pace_(pace), part_(bytes) {
    if (count != 1) return;
    const int parts = std::clamp(int(bytes / 4096), 1, kStreams);
    part_ = (bytes + parts * 64 - 1) / (parts * 64) * 64;
    for (int s = 0; s < parts; ++s) from_[s] = pages[0] + s * part_;
    streams_ = parts, at_ = count_ = 0;
  }

  [[gnu::always_inline]] void steps(int count) {
    credit_ += count * pace_.step;
    while (credit_ >= Pace::kUnit * streams_) {
      credit_ -= Pace::kUnit * streams_;
      if (!round()) break;
    }
  }

  void pause() {
    for (int lines = 0; lines < pace_.pause && round();) lines += streams_;
  }

  void rest() { while (round()) continue; }

 private:
  static constexpr int kStreams = 4;

  // A line of each stream; false at the end.
  [[gnu::always_inline]] bool round() {
    if (at_ >= part_ && !go_on()) return false;
    for (int s = 0; s < streams_; ++s) prefetch(from_[s] + at_);
    at_ += 64;
    return true;
  }

  // The next pages.
  [[gnu::always_inline]] bool go_on() {
    if (!count_) return false;
    streams_ = std::min(count_, kStreams);
    for (int s = 0; s < streams_; ++s) from_[s] = *pages_++;
    count_ -= streams_, at_ = 0;
    return true;
  }

  const uint8_t* from_[kStreams];
  const uint8_t* const* pages_ = nullptr;
  int streams_ = 1, count_ = 0, credit_ = 0;
  Pace pace_;
  size_t part_ = 0, at_ = SIZE_MAX;
};

}  // namespace bitkv::BITKV_ISA
