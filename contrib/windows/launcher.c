/* python.exe and pythonw.exe where a Windows Python comes without them: Py_Main of the DLL beside.
 *
 *     x86_64-w64-mingw32-gcc -municode -DPYTHON_DLL='L"python313.dll"' …  [-mwindows] [-DISOLATED]
 *
 * ISOLATED: with -I -B before what it is given. No PYTHON* variable counts, not even those that are
 * read before the file python3XX._pth, which says where modules are; nothing is written.
 */

#include <stdlib.h>
#include <wchar.h>
#include <windows.h>

typedef int (*py_main)(int, wchar_t **);

#ifdef ISOLATED
static wchar_t *const options[] = {L"-I", L"-B"};
#define OPTIONS 2
#else
static wchar_t *const options[] = {NULL};
#define OPTIONS 0
#endif

static int fail(const wchar_t *what)
{
    wchar_t text[512];

    swprintf(text, 512, L"%ls: error %lu. Install ssh-agent-proxy again.", what, GetLastError());
    MessageBoxW(NULL, text, L"ssh-agent-proxy", MB_OK | MB_ICONERROR | MB_SETFOREGROUND);
    return 1;
}

int wmain(int argc, wchar_t **argv)
{
    static wchar_t path[32768];
    wchar_t **words;
    DWORD length;
    wchar_t *name;
    HMODULE python;
    py_main run;

    /* No library is taken from the current folder, or from the PATH. */
    SetDllDirectoryW(L"");
    SetDefaultDllDirectories(LOAD_LIBRARY_SEARCH_APPLICATION_DIR | LOAD_LIBRARY_SEARCH_SYSTEM32);
    length = GetModuleFileNameW(NULL, path, 32768);
    name = wcsrchr(path, L'\\');
    if (length == 0 || length == 32768 || !name ||
        (size_t)(name + 1 - path) + wcslen(PYTHON_DLL) >= 32768)
        return fail(L"the program's own path is not known");
    wcscpy(name + 1, PYTHON_DLL);
    python = LoadLibraryExW(path, NULL,
                            LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR | LOAD_LIBRARY_SEARCH_SYSTEM32);
    if (!python)
        return fail(path);
    run = (py_main)(void *)GetProcAddress(python, "Py_Main");
    words = calloc((size_t)argc + OPTIONS + 1, sizeof(*words));
    if (!run || !words)
        return fail(L"Py_Main is missing");
    words[0] = argv[0];
    for (int i = 0; i < OPTIONS; i++)
        words[1 + i] = options[i];
    for (int i = 1; i < argc; i++)
        words[OPTIONS + i] = argv[i];
    return run(argc + OPTIONS, words);
}
