/* A PKCS#11 module with one slot, empty, whose C_GetSlotInfo says `stuck` and never returns once the file $STUCK
 * exists. If $STUCK_AT_EXIT is set, the end of the process does not come either. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long CK_ULONG;
enum { OK = 0, FUNCTION_NOT_SUPPORTED = 0x54, NO_EVENT = 8, REMOVABLE_DEVICE = 2, FUNCTIONS = 68 };

struct info { unsigned char cryptoki[2]; char manufacturer[32]; CK_ULONG flags; char library[32]; unsigned char version[2]; };
struct slot_info { char description[64], manufacturer[32]; CK_ULONG flags; unsigned char hardware[2], firmware[2]; };
struct functions { unsigned char version[2]; void *list[FUNCTIONS]; };

static CK_ULONG ok(void) { return OK; }
static CK_ULONG not_supported(void) { return FUNCTION_NOT_SUPPORTED; }
static CK_ULONG no_event(void) { return NO_EVENT; }

static CK_ULONG get_info(struct info *info) {
    memset(info, 0, sizeof *info);
    memset(info->manufacturer, ' ', sizeof info->manufacturer);
    memset(info->library, ' ', sizeof info->library);
    info->cryptoki[0] = 2;
    info->cryptoki[1] = 40;
    return OK;
}

static CK_ULONG get_slot_list(unsigned char present, CK_ULONG *slots, CK_ULONG *count) {
    *count = !present;
    if (slots != NULL && !present) {
        slots[0] = 1;
    }
    return OK;
}

static void wait_for_ever(void) {
    for (;;) {
        pause();
    }
}

__attribute__((destructor)) static void at_exit(void) {
    if (getenv("STUCK_AT_EXIT") != NULL) {
        wait_for_ever();
    }
}

static CK_ULONG get_slot_info(CK_ULONG slot, struct slot_info *info) {
    (void)slot;
    const char *file = getenv("STUCK");
    if (file != NULL && access(file, F_OK) == 0) {
        fprintf(stderr, "stuck\n");
        wait_for_ever();
    }
    memset(info, 0, sizeof *info);
    memset(info->description, ' ', sizeof info->description);
    memset(info->manufacturer, ' ', sizeof info->manufacturer);
    info->flags = REMOVABLE_DEVICE;
    return OK;
}

CK_ULONG C_GetFunctionList(struct functions **list) {
    static struct functions functions = {{2, 40}, {0}};
    for (int index = 0; index < FUNCTIONS; index++) {
        functions.list[index] = not_supported;
    }
    /* C_Initialize, C_Finalize, and so on in the order of PKCS #11 2.40, pkcs11f.h. */
    functions.list[0] = ok;
    functions.list[1] = ok;
    functions.list[2] = get_info;
    functions.list[3] = C_GetFunctionList;
    functions.list[4] = get_slot_list;
    functions.list[5] = get_slot_info;
    functions.list[67] = no_event;
    *list = &functions;
    return OK;
}
