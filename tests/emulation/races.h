// ThreadSanitizer's view of the machine: every emulated thread is a fiber of its own, ordered behind others
// by barriers alone, and what the machine does itself is not looked at. Nothing without -fsanitize=thread.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulation {

#if defined(__SANITIZE_THREAD__)
constexpr bool kFindRaces = true;

// What the thread does while one of these exists cannot race.
class Unseen {
 public:
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// Who acquires a tag comes after all who have released it before.
inline void release(void* tag) { __tsan_release(tag); }
inline void acquire(void* tag) { __tsan_acquire(tag); }
#else
constexpr bool kFindRaces = false;
struct Unseen {
  Unseen() {}  // not trivial, so that nobody warns of an unused variable
};
inline void release(void*) {}
inline void acquire(void*) {}
#endif

}  // namespace emulation
