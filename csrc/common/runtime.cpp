// Instruction level, errors and threads: the parts of the library that every kernel shares. Compiled once, plain.
#include <dlfcn.h>
#include <link.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "kernel.h"

namespace lt {

// ---- errors ---------------------------------------------------------------------------------------------------------

static thread_local char last_error[512] = "";

int fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return code;
}

// ---- instruction level ----------------------------------------------------------------------------------------------

static int isa_of_processor() {
#if defined(LT_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return ISA_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return ISA_AVX2;
#endif
    return ISA_BASE;
}

static const char *const isa_names[] = {"base", "avx2", "avx512"};

static int isa_by_name(const char *name) {
    for (int level = ISA_BASE; level <= ISA_AVX512; ++level)
        if (!strcmp(name, isa_names[level]))
            return level;
    return -1;
}

static int initial_isa() {
    const int best = isa_of_processor();
    const char *asked = getenv("LEANTUNE_ISA");
    const int level = asked ? isa_by_name(asked) : best;
    // A level that is unknown or beyond the processor is reported when the module loads (lt_set_isa says why).
    return level >= 0 && level <= best ? level : best;
}

static std::atomic<int> isa_level_in_use{-1};

int isa_in_use() {
    int level = isa_level_in_use.load(std::memory_order_relaxed);
    if (level < 0) {
        level = initial_isa();
        isa_level_in_use.store(level, std::memory_order_relaxed);
    }
    return level;
}

// ---- a pool of our own, for programs without an OpenMP runtime ------------------------------------------------------

namespace {

struct job {
    chunk_body body;
    void *context;
    int64_t chunks;
    std::atomic<int64_t> next{0};

    void run(int thread) {
        for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
            body(context, chunk, thread);
    }
};

class pool {
    std::vector<std::thread> workers;
    std::mutex mutex;
    std::condition_variable wake, done;
    job *current = nullptr;
    uint64_t generation = 0;
    int wanted = 0, running = 0;

    void work(int thread) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return generation != seen; });
            seen = generation;
            if (thread >= wanted)
                continue;
            job *mine = current;
            lock.unlock();
            mine->run(thread);
            lock.lock();
            if (--running == 0)
                done.notify_one();
        }
    }

  public:
    std::mutex turn; // one parallel region at a time

    void run(job &j, int threads) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            while ((int)workers.size() < threads - 1) {
                const int thread = (int)workers.size() + 1;
                workers.emplace_back([this, thread] { work(thread); });
                workers.back().detach();
            }
            current = &j;
            wanted = threads;
            running = threads - 1;
            ++generation;
        }
        wake.notify_all();
        j.run(0);
        std::unique_lock<std::mutex> lock(mutex);
        done.wait(lock, [&] { return running == 0; });
    }
};

// ---- the OpenMP runtime that the process has already ----------------------------------------------------------------

struct openmp {
    char name[256] = "";
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*max_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
};

int find_openmp(dl_phdr_info *info, size_t, void *found) {
    const char *path = info->dlpi_name ? info->dlpi_name : "";
    const char *slash = strrchr(path, '/');
    const char *file = slash ? slash + 1 : path;
    if (strncmp(file, "libgomp", 7) && strncmp(file, "libiomp5", 8) && strncmp(file, "libomp.", 7) &&
        strncmp(file, "libomp-", 7))
        return 0;
    openmp *o = static_cast<openmp *>(found);
    snprintf(o->name, sizeof o->name, "%s", path);
    return 1;
}

openmp borrow_openmp() {
    openmp o;
    if (!dl_iterate_phdr(find_openmp, &o))
        return o;
    if (void *library = dlopen(o.name, RTLD_NOLOAD | RTLD_LAZY)) {
        o.parallel = reinterpret_cast<decltype(o.parallel)>(dlsym(library, "GOMP_parallel"));
        o.thread_num = reinterpret_cast<decltype(o.thread_num)>(dlsym(library, "omp_get_thread_num"));
        o.max_threads = reinterpret_cast<decltype(o.max_threads)>(dlsym(library, "omp_get_max_threads"));
        o.in_parallel = reinterpret_cast<decltype(o.in_parallel)>(dlsym(library, "omp_in_parallel"));
    }
    if (!o.parallel || !o.thread_num || !o.max_threads || !o.in_parallel)
        return openmp();
    return o;
}

openmp runtime;                    // set by lt_adopt_openmp, before any kernel runs
std::atomic<int> threads_asked{0}; // 0: as many as the runtime or the machine offers
thread_local bool inside = false;  // a body that calls a kernel runs it on its own thread
pool *own_pool = nullptr;          // never freed: its threads may outlive static destructors
std::once_flag own_pool_made;

int processors() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
    const unsigned n = std::thread::hardware_concurrency();
    return n ? (int)n : 1;
}

} // namespace

int max_threads() {
    const int asked = threads_asked.load(std::memory_order_relaxed);
    if (asked > 0)
        return asked;
    return runtime.parallel ? runtime.max_threads() : processors();
}

void parallel_chunks(int64_t chunks, chunk_body body, void *context) {
    if (chunks <= 0)
        return;
    int threads = max_threads();
    if (threads > chunks)
        threads = (int)chunks;
    const bool nested = inside || (runtime.parallel && runtime.in_parallel());
    if (threads == 1 || nested) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            body(context, chunk, 0);
        return;
    }
    job j;
    j.body = body;
    j.context = context;
    j.chunks = chunks;
    if (runtime.parallel) {
        runtime.parallel([](void *p) { static_cast<job *>(p)->run(runtime.thread_num()); }, &j, (unsigned)threads, 0);
        return;
    }
    std::call_once(own_pool_made, [] { own_pool = new pool; });
    std::lock_guard<std::mutex> turn(own_pool->turn);
    inside = true;
    own_pool->run(j, threads);
    inside = false;
}

void *thread_scratch(int64_t bytes) {
    struct block {
        void *memory = nullptr;
        int64_t size = 0;
        ~block() { free(memory); }
    };
    static thread_local block mine;
    if (bytes > mine.size) {
        free(mine.memory);
        mine.size = (bytes + 4095) / 4096 * 4096;
        mine.memory = aligned_alloc(64, (size_t)mine.size);
        if (!mine.memory)
            mine.size = 0;
    }
    return mine.memory;
}

} // namespace lt

// ---- C functions ----------------------------------------------------------------------------------------------------

extern "C" {

LT_API const char *lt_last_error(void) { return lt::last_error; }

LT_API const char *lt_isa(void) { return lt::isa_names[lt::isa_in_use()]; }

LT_API int lt_set_isa(const char *name) {
    const int level = lt::isa_by_name(name);
    if (level < 0)
        return lt::fail(LT_INVALID, "instruction level '%s' is none of base, avx2, avx512", name);
    const int best = lt::isa_of_processor();
    if (level > best)
        return lt::fail(LT_INVALID, "instruction level '%s' is beyond this processor, which has '%s'", name,
                        lt::isa_names[best]);
    lt::isa_level_in_use.store(level, std::memory_order_relaxed);
    return LT_OK;
}

LT_API const char *lt_adopt_openmp(void) {
    if (!lt::runtime.parallel)
        lt::runtime = lt::borrow_openmp();
    return lt::runtime.name;
}

LT_API int lt_set_num_threads(int threads) {
    if (threads < 0)
        return lt::fail(LT_INVALID, "threads=%d is negative; use 0 for the runtime's own number", threads);
    lt::threads_asked.store(threads, std::memory_order_relaxed);
    return LT_OK;
}

LT_API int lt_num_threads(void) { return lt::max_threads(); }
}
