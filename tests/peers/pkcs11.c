/* A PKCS#11 program that signs and signs, as one with a session that lasts.
 *
 *   pkcs11 MODULE   logs in to the first token
 *
 * The PIN is the first line of standard input. After `ready`, each further line is `sign N` or `slow-sign N`: as many
 * signatures, RSA PKCS#1 v1.5, with the first private key that signs. It is answered with the nanoseconds that all of
 * them would take if each took the median time, or as long as 99 of 100 take at most; or ends the program with 1.
 */
#include <dlfcn.h>
#include <pkcs11.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void check(const char *what, CK_RV result) {
    if (result != CKR_OK) {
        fprintf(stderr, "pkcs11: %s: %#lx\n", what, (unsigned long)result);
        exit(1);
    }
}

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int order(const void *one, const void *other) {
    long long a = *(const long long *)one, b = *(const long long *)other;
    return (a > b) - (a < b);
}

int main(int argc, char **argv) {
    char line[128], pin[64];
    CK_FUNCTION_LIST_PTR module;
    CK_SLOT_ID slot;
    CK_SESSION_HANDLE session;
    CK_OBJECT_HANDLE key;
    CK_ULONG count = 1;
    CK_OBJECT_CLASS class = CKO_PRIVATE_KEY;
    CK_BBOOL yes = CK_TRUE;
    CK_ATTRIBUTE wanted[] = {{CKA_CLASS, &class, sizeof class}, {CKA_SIGN, &yes, sizeof yes}};
    CK_MECHANISM mechanism = {CKM_RSA_PKCS, NULL, 0};
    CK_BYTE data[51] = {0x5A}, signature[512];

    if (argc != 2 || fgets(pin, sizeof pin, stdin) == NULL) {
        fprintf(stderr, "usage: pkcs11 MODULE, the PIN on standard input\n");
        return 2;
    }
    pin[strcspn(pin, "\n")] = 0;
    void *library = dlopen(argv[1], RTLD_NOW);
    CK_C_GetFunctionList list = library ? (CK_C_GetFunctionList)dlsym(library, "C_GetFunctionList") : NULL;
    if (list == NULL) {
        fprintf(stderr, "pkcs11: %s\n", dlerror());
        return 1;
    }
    check("C_GetFunctionList", list(&module));
    check("C_Initialize", module->C_Initialize(NULL));
    check("C_GetSlotList", module->C_GetSlotList(CK_TRUE, &slot, &count));
    check("a token", count == 1 ? CKR_OK : CKR_TOKEN_NOT_PRESENT);
    check("C_OpenSession", module->C_OpenSession(slot, CKF_SERIAL_SESSION, NULL, NULL, &session));
    check("C_Login", module->C_Login(session, CKU_USER, (CK_BYTE *)pin, strlen(pin)));
    check("C_FindObjectsInit", module->C_FindObjectsInit(session, wanted, 2));
    check("C_FindObjects", module->C_FindObjects(session, &key, 1, &count));
    check("a private key", count == 1 ? CKR_OK : CKR_KEY_HANDLE_INVALID);
    check("C_FindObjectsFinal", module->C_FindObjectsFinal(session));
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) != NULL) {
        static long long times[10000];
        int signatures, slow = strncmp(line, "slow-", 5) == 0;
        if (sscanf(line + (slow ? 5 : 0), "sign %d", &signatures) != 1 || signatures < 1 || signatures > 10000) {
            check(line, CKR_ARGUMENTS_BAD);
        }
        for (int i = 0; i < signatures; i++) {
            CK_ULONG length = sizeof signature;
            long long start = now();
            check("C_SignInit", module->C_SignInit(session, &mechanism, key));
            check("C_Sign", module->C_Sign(session, data, sizeof data, signature, &length));
            times[i] = now() - start;
        }
        qsort(times, signatures, sizeof times[0], order);
        printf("%lld\n", times[slow ? (signatures - 1) * 99 / 100 : signatures / 2] * signatures);
        fflush(stdout);
    }
    return 0;
}
