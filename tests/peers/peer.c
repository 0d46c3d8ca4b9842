/* What the emulated card is measured against: libcacard on the same database, and NSS itself.
 *
 *   peer libcacard DATABASE CERTIFICATE...   a card of libcacard's
 *   peer nss DATABASE CERTIFICATE            raw RSA with NSS, the key copied to the session
 *   peer nss-token DATABASE CERTIFICATE      the same with the key left in the database, as libcacard uses it
 *
 * The PIN is the first line of standard input. libcacard says `answered` after its first SELECT, before the PIN is
 * verified. After `ready`, each further line is an operation and a count,
 * `select 1000` or `sign 100` or (nss only) `sign2 100`: two threads, each with a login of its own. It is answered
 * with the nanoseconds of processor time that all of them took, for two threads with those of the clock; or it ends
 * the program with 1.
 */
#include <libcacard.h>
#include <nss.h>
#include <pk11pub.h>
#include <pthread.h>
#include <secmod.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MODULUS = 256, THREADS = 2 };

static char pin[64];

static void fail(const char *what) {
    fprintf(stderr, "peer: %s (NSS error %d)\n", what, PORT_GetError());
    exit(1);
}

static long long now(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* PKCS#1 type 1 padding around nothing much. */
static void fill(unsigned char *block) {
    memset(block, 0xFF, MODULUS);
    block[0] = 0;
    block[1] = 1;
    block[MODULUS - 36] = 0;
    memset(block + MODULUS - 35, 0x5A, 35);
}

/* libcacard */

static VReader *reader;

static void transmit(const unsigned char *command, int length, unsigned char *answer, int *answered, int status) {
    *answered = 258;
    if (vreader_xfr_bytes(reader, (unsigned char *)command, length, answer, answered) != VREADER_OK) {
        fail("vreader_xfr_bytes");
    }
    if (*answered < 2 || answer[*answered - 2] != status) {
        fprintf(stderr, "peer: INS %02X was answered with %02X%02X\n", command[1], answer[*answered - 2],
                answer[*answered - 1]);
        exit(1);
    }
}

static const unsigned char select_pki[] = {0, 0xA4, 4, 0, 7, 0xA0, 0, 0, 0, 0x79, 1, 0};

static void card_select(void) {
    unsigned char answer[258];
    int length;
    transmit(select_pki, sizeof select_pki, answer, &length, 0x61);
}

static void card_sign(void) {
    unsigned char block[MODULUS], command[5 + 240], answer[258];
    int length;
    fill(block);
    memcpy(command, (unsigned char[]){0, 0x42, 0x80, 0, 240}, 5);
    memcpy(command + 5, block, 240);
    transmit(command, 245, answer, &length, 0x90);
    memcpy(command, (unsigned char[]){0, 0x42, 0, 0, 16}, 5);
    memcpy(command + 5, block + 240, 16);
    transmit(command, 21, answer, &length, 0x61);
    transmit((unsigned char[]){0, 0xC0, 0, 0, 0}, 5, answer, &length, 0x90);
    if (length != MODULUS + 2) {
        fail("a signature of another length");
    }
}

static void card_open(const char *database, char **names, int count) {
    unsigned char verify[13] = {0, 0x20, 0, 0, 8}, answer[258];
    char options[1024];
    int length, at = snprintf(options, sizeof options, "db=\"%s\" use_hw=no soft=(,Reader,CAC,", database);
    for (int i = 0; i < count; i++) {
        at += snprintf(options + at, sizeof options - at, ",%s", names[i]);
    }
    snprintf(options + at, sizeof options - at, ")");
    if (vcard_emul_init(vcard_emul_options(options)) != VCARD_EMUL_OK) {
        fail("vcard_emul_init");
    }
    VReaderList *list = vreader_get_reader_list();
    VReaderListEntry *entry = vreader_list_get_first(list);
    if (entry == NULL) {
        fail("no reader");
    }
    reader = vreader_list_get_reader(entry);
    vreader_list_delete(list);
    if (vreader_power_on(reader, NULL, NULL) != VREADER_OK) {
        fail("vreader_power_on");
    }
    memset(verify + 5, 0xFF, 8);
    memcpy(verify + 5, pin, strlen(pin));
    transmit(select_pki, sizeof select_pki, answer, &length, 0x61);
    printf("answered\n");
    fflush(stdout);
    transmit(verify, sizeof verify, answer, &length, 0x90);
}

/* NSS */

struct login {
    PK11SlotInfo *slot;
    SECKEYPrivateKey *key;
    int count;
};

static struct login logins[THREADS];

static SECItem *certificate_id(PK11SlotInfo *slot, const char *name) {
    PK11GenericObject *object = PK11_FindGenericObjects(slot, CKO_CERTIFICATE);
    for (; object != NULL; object = PK11_GetNextGenericObject(object)) {
        SECItem label = {siBuffer, NULL, 0}, *id = calloc(1, sizeof *id);
        if (PK11_ReadRawAttribute(PK11_TypeGeneric, object, CKA_LABEL, &label) == SECSuccess &&
            label.len == strlen(name) && memcmp(label.data, name, label.len) == 0 &&
            PK11_ReadRawAttribute(PK11_TypeGeneric, object, CKA_ID, id) == SECSuccess) {
            return id;
        }
    }
    fail("no such certificate");
    return NULL;
}

static void nss_open(const char *database, const char *name, int copy) {
    char spec[1024];
    PRUint32 flags = NSS_INIT_READONLY | NSS_INIT_NOCERTDB | NSS_INIT_NOMODDB | NSS_INIT_FORCEOPEN |
                     NSS_INIT_NOROOTINIT;
    if (NSS_InitContext("", "", "", "secmod.db", NULL, flags) == NULL) {
        fail("NSS_InitContext");
    }
    for (int i = 0; i < THREADS; i++) {
        struct login *login = &logins[i];
        snprintf(spec, sizeof spec, "configdir='%s' tokenDescription='%d' flags=readOnly", database, i);
        login->slot = SECMOD_OpenUserDB(spec);
        if (login->slot == NULL || PK11_CheckUserPassword(login->slot, pin) != SECSuccess) {
            fail("login");
        }
        login->key = PK11_FindKeyByKeyID(login->slot, certificate_id(login->slot, name), NULL);
        if (login->key != NULL && copy) {
            login->key = PK11_CopyTokenPrivKeyToSessionPrivKey(login->slot, login->key);
        }
        if (login->key == NULL) {
            fail("no private key");
        }
    }
}

static void *nss_sign(void *argument) {
    struct login *login = argument;
    unsigned char block[MODULUS], result[MODULUS];
    unsigned length;
    fill(block);
    for (int i = 0; i < login->count; i++) {
        if (PK11_PrivDecryptRaw(login->key, result, &length, MODULUS, block, MODULUS) != SECSuccess) {
            fail("PK11_PrivDecryptRaw");
        }
    }
    return NULL;
}

static void nss_sign2(int count) {
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        logins[i].count = count;
        if (pthread_create(&threads[i], NULL, nss_sign, &logins[i]) != 0) {
            fail("pthread_create");
        }
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
}

int main(int argc, char **argv) {
    char line[128], operation[16];
    int count, card = argc > 3 && strcmp(argv[1], "libcacard") == 0;
    if (argc < 4 || fgets(pin, sizeof pin, stdin) == NULL) {
        fail("usage: peer libcacard|nss|nss-token DATABASE CERTIFICATE..., the PIN on standard input");
    }
    pin[strcspn(pin, "\n")] = 0;
    if (strlen(pin) > 8) {
        fail("the PIN is longer than 8 characters");
    }
    if (card) {
        card_open(argv[2], argv + 3, argc - 3);
    } else {
        nss_open(argv[2], argv[3], strcmp(argv[1], "nss") == 0);
    }
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) != NULL) {
        if (sscanf(line, "%15s %d", operation, &count) != 2 || count < 1) {
            fail("expected an operation and a count");
        }
        clockid_t clock = strcmp(operation, "sign2") == 0 ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID;
        long long start = now(clock);
        if (card && strcmp(operation, "select") == 0) {
            for (int i = 0; i < count; i++) {
                card_select();
            }
        } else if (card && strcmp(operation, "sign") == 0) {
            for (int i = 0; i < count; i++) {
                card_sign();
            }
        } else if (!card && strcmp(operation, "sign") == 0) {
            logins[0].count = count;
            nss_sign(&logins[0]);
        } else if (!card && strcmp(operation, "sign2") == 0) {
            nss_sign2(count);
        } else {
            fail("no such operation");
        }
        printf("%lld\n", now(clock) - start);
        fflush(stdout);
    }
    return 0;
}
