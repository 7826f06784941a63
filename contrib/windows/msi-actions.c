/* What the installer can't do by its tables: end a running tray, and tell whether there was one.
 *
 * A DLL that is in the MSI, not in the folder that it installs: it ends the tray of whatever
 * version is there, before Windows Installer looks for files in use (InstallValidate). */
#include <windows.h>
#include <msi.h>
#include <msiquery.h>

#define TRAY_CLASS L"ssh-agent-proxy tray"
/* It drains within the 5 s that Windows gives at logoff; twice that is one that hangs. */
#define PATIENCE_MS 10000

/* Sets TRAYWASRUNNING where one ran. Whatever goes wrong, Windows Installer goes on: what is left
 * running is found by InstallValidate, which asks the person. */
UINT __stdcall EndTray(MSIHANDLE install)
{
    HWND window = FindWindowW(TRAY_CLASS, NULL);
    DWORD process_id = 0;
    HANDLE process;

    if (window == NULL)
        return ERROR_SUCCESS;
    MsiSetPropertyW(install, L"TRAYWASRUNNING", L"1");
    GetWindowThreadProcessId(window, &process_id);
    process = OpenProcess(SYNCHRONIZE | PROCESS_TERMINATE, FALSE, process_id);
    PostMessageW(window, WM_CLOSE, 0, 0);
    if (process == NULL)
        return ERROR_SUCCESS;
    if (WaitForSingleObject(process, PATIENCE_MS) == WAIT_TIMEOUT) {
        TerminateProcess(process, 1);
        WaitForSingleObject(process, 1000);
    }
    CloseHandle(process);
    return ERROR_SUCCESS;
}
