/* python.exe and pythonw.exe where a Windows Python comes without them: Py_Main of the DLL beside.
 *
 *     x86_64-w64-mingw32-gcc -municode -DPYTHON_DLL='L"python313.dll"' …  [-mwindows] [-DISOLATED]
 *
 * ISOLATED: nothing in the environment changes what is run (a file python3XX._pth beside the DLL
 * says where modules are, and turns site and the current folder off).
 */

#include <windows.h>
#include <wchar.h>

typedef int (*py_main)(int, wchar_t **);

static int fail(const wchar_t *what)
{
    wchar_t text[512];

    swprintf(text, 512, L"%ls: error %lu. Install ssh-agent-proxy again.", what, GetLastError());
    MessageBoxW(NULL, text, L"ssh-agent-proxy", MB_OK | MB_ICONERROR | MB_SETFOREGROUND);
    return 1;
}

/* PYTHONHOME, PYTHONSTARTUP, PYTHONINSPECT and the like, of which a ._pth file stops only some. */
static void forget_variables(void)
{
    wchar_t *block = GetEnvironmentStringsW();

    for (wchar_t *entry = block; entry && *entry; entry += wcslen(entry) + 1) {
        wchar_t name[256];
        size_t length = wcscspn(entry, L"=");

        if (_wcsnicmp(entry, L"PYTHON", 6) == 0 && length < 256) {
            wmemcpy(name, entry, length);
            name[length] = 0;
            SetEnvironmentVariableW(name, NULL);
            _wputenv_s(name, L""); /* the C library's copy */
        }
    }
    if (block)
        FreeEnvironmentStringsW(block);
}

int wmain(int argc, wchar_t **argv)
{
    static wchar_t path[32768];
    DWORD length;
    wchar_t *name;
    HMODULE python;
    py_main run;

    /* No library is taken from the current folder, or from the PATH. */
    SetDllDirectoryW(L"");
    SetDefaultDllDirectories(LOAD_LIBRARY_SEARCH_APPLICATION_DIR | LOAD_LIBRARY_SEARCH_SYSTEM32);
#ifdef ISOLATED
    forget_variables();
#else
    (void)forget_variables;
#endif
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
    return run ? run(argc, argv) : fail(L"Py_Main is missing");
}
