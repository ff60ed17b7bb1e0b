// Instruction level, errors and threads: the parts of the library that every kernel shares. Compiled once, plain.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#if defined(LT_X86)
#include <cpuid.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

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

#if defined(LT_X86)

// All that -march=x86-64-v3 lets the compiler use beyond plain x86-64. A virtual machine may hide any one of them.
static bool has_x86_64_v3() {
    // Bits of CPUID that __builtin_cpu_supports cannot name in every compiler.
    constexpr unsigned kCmpxchg16b = 1u << 13, kMovbe = 1u << 22, kLahf = 1u << 0, kLzcnt = 1u << 5;
    constexpr unsigned kBasic = kCmpxchg16b | kMovbe, kExtended = kLahf | kLzcnt;
    unsigned a, b, basic, extended, d;
    if (!__get_cpuid(1, &a, &b, &basic, &d) || !__get_cpuid(0x80000001u, &a, &b, &extended, &d))
        return false;
    return (basic & kBasic) == kBasic && (extended & kExtended) == kExtended && __builtin_cpu_supports("sse3") &&
           __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("sse4.2") &&
           __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("avx") && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

// What -march=x86-64-v4 adds.
static bool adds_x86_64_v4() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

static int isa_of_processor() {
    __builtin_cpu_init();
    if (!has_x86_64_v3())
        return ISA_BASE;
    return adds_x86_64_v4() ? ISA_AVX512 : ISA_AVX2;
}

#else

static int isa_of_processor() { return ISA_BASE; }

#endif

static const char *const isa_names[] = {"base", "avx2", "avx512"};

// -1 for none; spaces around the name do not matter.
static int isa_by_name(const char *name) {
    name += strspn(name, " ");
    for (int level = ISA_BASE; level <= ISA_AVX512; ++level) {
        const size_t length = strlen(isa_names[level]);
        if (!strncmp(name, isa_names[level], length) && !name[length + strspn(name + length, " ")])
            return level;
    }
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

thread_local bool inside = false; // a body that calls a kernel runs it on its own thread

// Each thread begins with a run of neighbouring chunks, the same in every call over as many, so that what one kernel
// wrote lies in the cache of the core that reads it in the next; who is done takes from the others.
class job {
    static constexpr int kMostShares = 64;
    struct alignas(64) share { // a cache line each
        std::atomic<int64_t> next;
        int64_t end;
    };
    chunk_body body;
    void *context;
    int shares;
    share of[kMostShares];

  public:
    job(chunk_body body, void *context, int64_t chunks, int threads)
        : body(body), context(context), shares(threads < kMostShares ? threads : kMostShares) {
        for (int64_t i = 0; i < shares; ++i) {
            of[i].next.store(chunks / shares * i + chunks % shares * i / shares, std::memory_order_relaxed);
            of[i].end = chunks / shares * (i + 1) + chunks % shares * (i + 1) / shares;
        }
    }

    void run(int thread) {
        for (int i = 0; i < shares; ++i) {
            share &from = of[(thread + i) % shares];
            for (int64_t chunk; (chunk = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;)
                body(context, chunk, thread);
        }
    }
};

class pool {
    std::mutex mutex;
    std::condition_variable wake, done;
    job *current = nullptr;
    uint64_t generation = 0;
    int workers = 0, wanted = 0, running = 0;

    void work(int thread) {
        inside = true;
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

    // Starts workers until there are `number`, or as many as the system grants.
    void hire(int number) {
        try {
            for (; workers < number; ++workers) {
                const int thread = workers + 1;
                std::thread([this, thread] { work(thread); }).detach();
            }
        } catch (const std::exception &) {
            return; // no more threads to be had: the ones there are share the chunks
        }
    }

  public:
    std::mutex turn; // one parallel region at a time

    void run(job &j, int threads) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            hire(threads - 1);
            wanted = threads - 1 < workers ? threads : workers + 1;
            current = &j;
            running = wanted - 1;
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
    char name[4096] = "";
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*max_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
};

// The four functions as a search of `scope` finds them, provided that one library has them all.
bool take_openmp(void *scope, openmp *o) {
    void *const functions[] = {dlsym(scope, "GOMP_parallel"), dlsym(scope, "omp_get_thread_num"),
                               dlsym(scope, "omp_get_max_threads"), dlsym(scope, "omp_in_parallel")};
    Dl_info home = {}, other;
    for (void *function : functions) {
        if (!function || !dladdr(function, &other) || (home.dli_fbase && home.dli_fbase != other.dli_fbase))
            return false;
        home = other;
    }
    snprintf(o->name, sizeof o->name, "%s", home.dli_fname);
    o->parallel = reinterpret_cast<decltype(o->parallel)>(functions[0]);
    o->thread_num = reinterpret_cast<decltype(o->thread_num)>(functions[1]);
    o->max_threads = reinterpret_cast<decltype(o->max_threads)>(functions[2]);
    o->in_parallel = reinterpret_cast<decltype(o->in_parallel)>(functions[3]);
    return true;
}

int find_by_name(dl_phdr_info *info, size_t, void *found) {
    const char *path = info->dlpi_name ? info->dlpi_name : "";
    const char *slash = strrchr(path, '/');
    const char *file = slash ? slash + 1 : path;
    if (strncmp(file, "libgomp", 7) && strncmp(file, "libiomp5", 8) && strncmp(file, "libomp.", 7) &&
        strncmp(file, "libomp-", 7))
        return 0;
    openmp *o = static_cast<openmp *>(found);
    snprintf(o->name, sizeof o->name, "%s", path); // opened later: the linker's lock is held here
    return 1;
}

// PyTorch's own where PyTorch is loaded, however many others came first (scikit-learn's wheel brings one, too): its
// symbols were bound by searching the global scope and then its dependencies, so the same search finds the same
// runtime. Without PyTorch it is the first by name.
openmp borrow_openmp() {
    openmp o;
    void *torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    if (take_openmp(RTLD_DEFAULT, &o) || (torch && take_openmp(torch, &o)))
        return o;
    void *library = dl_iterate_phdr(find_by_name, &o) ? dlopen(o.name, RTLD_NOLOAD | RTLD_LAZY) : nullptr;
    return library && take_openmp(library, &o) ? o : openmp();
}

openmp runtime;                        // set by lt_adopt_openmp, before any kernel runs
std::atomic<int> threads_asked{0};     // 0: as many as the runtime or the machine offers
std::atomic<pool *> own_pool{nullptr}; // never freed: its threads may outlive static destructors

// A child process has none of the pool's threads, and perhaps a mutex that one of them held: it makes a new pool.
const int fork_is_watched = pthread_atfork(nullptr, nullptr, [] { own_pool.store(nullptr); });

// Null when memory is short. Takes no lock, which a fork in another thread could leave locked for ever.
pool *pool_of_our_own() {
    pool *present = own_pool.load();
    if (present)
        return present;
    pool *made = new (std::nothrow) pool;
    if (own_pool.compare_exchange_strong(present, made))
        return made;
    delete made; // another thread was first; no worker has started here
    return present;
}

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
    pool *const own = threads == 1 || nested || runtime.parallel ? nullptr : pool_of_our_own();
    if (threads == 1 || nested || !(runtime.parallel || own)) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            body(context, chunk, 0);
        return;
    }
    job j(body, context, chunks, threads);
    if (runtime.parallel) {
        runtime.parallel([](void *p) { static_cast<job *>(p)->run(runtime.thread_num()); }, &j, (unsigned)threads, 0);
        return;
    }
    std::lock_guard<std::mutex> turn(own->turn);
    inside = true;
    own->run(j, threads);
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
