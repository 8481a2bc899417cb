// guard.cpp: loaded before libc's allocator, it gives every aligned block, which is every tensor's and every scratch memory,
// pages of its own with one behind them that nobody may touch. What lies between the block's end and that page is filled, and
// looked at when the block is freed. A freed block stays untouchable, and its addresses are given to no other.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>

extern "C" {
void __libc_free(void*);
void* __libc_realloc(void*, size_t);
void* __libc_malloc(size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {

constexpr size_t PAGE = 4096, ARENA = size_t(1) << 38, HEADER = 64;
constexpr unsigned char FILL = 0xA5;

struct Header {
    size_t size, data, pages;  // of the data; where they begin, from here on; how many pages may be touched, from here on
};

std::atomic<char*> arena{nullptr};
std::atomic<size_t> taken{0};
std::atomic<int64_t> blocks{0};

char* base() {
    char* found = arena.load();
    if (found != nullptr) return found;
    void* made = mmap(nullptr, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) return nullptr;
    if (arena.compare_exchange_strong(found, static_cast<char*>(made))) return static_cast<char*>(made);
    munmap(made, ARENA);
    return found;
}

bool ours(const void* p) {
    const char *at = static_cast<const char*>(p), *first = arena.load();
    return first != nullptr && at >= first && at < first + ARENA;
}

[[noreturn]] void found(const char* what) {
    (void)!write(2, what, std::strlen(what));
    _exit(77);
}

void* guarded(size_t alignment, size_t size) {
    char* first = base();
    if (alignment < 64) alignment = 64;
    // with a page in front of the data, for the header; the block's last page is followed by one that stays untouchable
    if (first == nullptr || alignment > PAGE || size > ARENA / 16) return __libc_memalign(alignment, size);
    const size_t slack = (alignment - size % alignment) % alignment, pages = 1 + (size + slack + PAGE - 1) / PAGE;
    const size_t at = taken.fetch_add((pages + 1) * PAGE);
    if (at + (pages + 1) * PAGE > ARENA) return __libc_memalign(alignment, size);
    char *block = first + at, *end = block + pages * PAGE;
    if (mprotect(block, pages * PAGE, PROT_READ | PROT_WRITE) != 0) return nullptr;
    char* const data = end - slack - size;
    *reinterpret_cast<Header*>(block) = {size, size_t(data - block), pages};
    std::memset(block + HEADER, FILL, size_t(data - block) - HEADER);
    std::memset(data + size, FILL, slack);
    blocks.fetch_add(1);
    return data;
}

Header* header_of(void* p) {
    const size_t page = size_t(static_cast<char*>(p) - arena.load()) / PAGE - 1;  // data begin on a block's second page
    auto* header = reinterpret_cast<Header*>(arena.load() + page * PAGE);
    if (header->data != size_t(static_cast<char*>(p) - reinterpret_cast<char*>(header)))
        found("guard: a pointer was freed that is no block's\n");
    return header;
}

void release(void* p) {
    Header* const header = header_of(p);
    char* const block = reinterpret_cast<char*>(header);
    const char *data = block + header->data, *end = block + header->pages * PAGE;
    for (const char* c = block + HEADER; c < data; ++c)
        if (static_cast<unsigned char>(*c) != FILL) found("guard: something was written before the first byte of a block\n");
    for (const char* c = data + header->size; c < end; ++c)
        if (static_cast<unsigned char>(*c) != FILL) found("guard: something was written behind the last byte of a block\n");
    const size_t bytes = header->pages * PAGE;
    madvise(block, bytes, MADV_DONTNEED);
    mprotect(block, bytes, PROT_NONE);
}

}  // namespace

#define RK_SHOWN extern "C" __attribute__((visibility("default")))

RK_SHOWN int64_t guarded_blocks() { return blocks.load(); }

RK_SHOWN int posix_memalign(void** to, size_t alignment, size_t size) {
    void* made = guarded(alignment, size);
    if (made == nullptr) return ENOMEM;
    *to = made;
    return 0;
}
RK_SHOWN void* aligned_alloc(size_t alignment, size_t size) { return guarded(alignment, size); }
RK_SHOWN void* memalign(size_t alignment, size_t size) { return guarded(alignment, size); }
RK_SHOWN void free(void* p) {
    if (p != nullptr && ours(p)) release(p);
    else __libc_free(p);
}
RK_SHOWN void* realloc(void* p, size_t size) {
    if (p == nullptr || !ours(p)) return __libc_realloc(p, size);
    void* made = __libc_malloc(size);
    const size_t had = header_of(p)->size;
    if (made != nullptr) {
        std::memcpy(made, p, had < size ? had : size);
        release(p);
    }
    return made;
}
