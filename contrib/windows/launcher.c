/* Programs of Windows' that run Python: Py_Main of its DLL.
 *
 *     x86_64-w64-mingw32-gcc -municode '-DPYTHON_DLL=L"python313.dll"' …  [-mwindows]
 *         python.exe and pythonw.exe, where a Windows Python comes without them: beside the DLL.
 *
 *     … -DSSH_AGENT_PROXY
 *         ssh-agent-proxy.exe, for a console: beside the script and the folder python. With -I -B:
 *         no PYTHON* variable counts, not even those that are read before the file python3XX._pth,
 *         which says where modules are; nothing is written.
 */

#include <stdio.h>
#include <stdlib.h>
#include <wchar.h>
#include <windows.h>

#ifdef SSH_AGENT_PROXY
#define DLL L"python\\" PYTHON_DLL
#else
#define DLL PYTHON_DLL
#endif
#define MAX_PATH_CHARS 32768

typedef int (*py_main)(int, wchar_t **);

static int fail(const wchar_t *what)
{
    wchar_t text[512];

    swprintf(text, 512, L"Install ssh-agent-proxy again: error %lu, %.300ls", GetLastError(), what);
#ifdef SSH_AGENT_PROXY
    char said[2048] = "";
    WideCharToMultiByte(GetConsoleOutputCP(), 0, text, -1, said, sizeof(said) - 1, NULL, NULL);
    fprintf(stderr, "ssh-agent-proxy: %s\n", said);
#else
    MessageBoxW(NULL, text, L"ssh-agent-proxy", MB_OK | MB_ICONERROR | MB_SETFOREGROUND);
#endif
    return 1;
}

/* NAME in this program's folder; NULL where that is not known. */
static wchar_t *beside(const wchar_t *name)
{
    wchar_t *path = calloc(MAX_PATH_CHARS, sizeof(*path));
    wchar_t *end;
    DWORD length;

    if (!path)
        return NULL;
    length = GetModuleFileNameW(NULL, path, MAX_PATH_CHARS);
    end = wcsrchr(path, L'\\');
    if (length == 0 || length == MAX_PATH_CHARS || !end ||
        (size_t)(end + 1 - path) + wcslen(name) >= MAX_PATH_CHARS)
        return NULL;
    wcscpy(end + 1, name);
    return path;
}

int wmain(int argc, wchar_t **argv)
{
    const wchar_t *dll;
    wchar_t **words;
    int count = 0;
    HMODULE python;
    py_main run;

    /* No library is taken from the current folder, or from the PATH. */
    SetDllDirectoryW(L"");
    SetDefaultDllDirectories(LOAD_LIBRARY_SEARCH_APPLICATION_DIR | LOAD_LIBRARY_SEARCH_SYSTEM32);
    dll = beside(DLL);
    if (!dll)
        return fail(L"the program's own path is not known");
    python = LoadLibraryExW(dll, NULL,
                            LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR | LOAD_LIBRARY_SEARCH_SYSTEM32);
    if (!python)
        return fail(dll);
    run = (py_main)(void *)GetProcAddress(python, "Py_Main");
    words = calloc((size_t)argc + 4, sizeof(*words));
    if (!run || !words)
        return fail(L"Py_Main is missing");
    words[count++] = argv[0];
#ifdef SSH_AGENT_PROXY
    words[count++] = L"-I";
    words[count++] = L"-B";
    words[count] = beside(L"ssh_agent_proxy.py");
    if (!words[count] || GetFileAttributesW(words[count]) == INVALID_FILE_ATTRIBUTES)
        return fail(L"ssh_agent_proxy.py is not beside this program");
    count++;
#endif
    for (int i = 1; i < argc; i++)
        words[count++] = argv[i];
    return run(count, words);
}
