// Names of kernels, which are local symbols: dladdr does not know them, the symbol table of the file does.
#include "block.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace lt_host {

static std::string read_file(const char *path) {
    std::string content;
    if (FILE *file = fopen(path, "rb")) {
        char part[1 << 16];
        while (size_t n = fread(part, 1, sizeof part, file))
            content.append(part, n);
        fclose(file);
    }
    return content;
}

static std::string demangled(const char *symbol) {
    char *text = abi::__cxa_demangle(symbol, nullptr, nullptr, nullptr);
    std::string name = text ? text : symbol;
    free(text);
    // "void lt_cuda::(anonymous namespace)::name_kernel<float>(float *)"
    const size_t kernel = name.find("_kernel");
    const size_t before = name.find_last_of(": ", kernel);
    name.erase(std::min(name.size(), name.find_first_of("<(", kernel)));
    return before == std::string::npos ? name : name.substr(before + 1);
}

static std::map<const void *, std::string> functions_of_this_library() {
    std::map<const void *, std::string> names;
    Dl_info info;
    if (!dladdr((const void *)&kernel_name, &info))
        return names;
    const std::string file = read_file(info.dli_fname);
    const char *base = file.data();
    const ElfW(Ehdr) &header = *(const ElfW(Ehdr) *)base;
    const ElfW(Shdr) *sections = (const ElfW(Shdr) *)(base + header.e_shoff);
    for (int s = 0; s < header.e_shnum; ++s) {
        if (sections[s].sh_type != SHT_SYMTAB)
            continue;
        const ElfW(Sym) *symbols = (const ElfW(Sym) *)(base + sections[s].sh_offset);
        const char *strings = base + sections[sections[s].sh_link].sh_offset;
        for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; ++i)
            if ((symbols[i].st_info & 0xf) == STT_FUNC && strstr(strings + symbols[i].st_name, "_kernel"))
                names[(char *)info.dli_fbase + symbols[i].st_value] = demangled(strings + symbols[i].st_name);
    }
    return names;
}

const char *kernel_name(const void *kernel) {
    static const std::map<const void *, std::string> names = functions_of_this_library();
    const auto found = names.find(kernel);
    return found == names.end() ? "(not named *_kernel)" : found->second.c_str();
}

} // namespace lt_host
