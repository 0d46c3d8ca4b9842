//! The calls into libnss3, and the only `unsafe` of the project.
//!
//! `nss-sys` gives the types and links the library; the functions it lacks are declared here. Results of C
//! type `SECStatus` are taken as `c_int`: an enum value that a newer NSS adds would be undefined behaviour in
//! a Rust enum.
//!
//! What is exported is safe: handles are freed on drop, a key keeps its slot open, and an error is read in
//! the thread and right after the call that failed, because NSS keeps errors per thread and overwrites them
//! freely.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fmt;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use libc::{c_char, c_int, c_uchar, c_uint, c_ulong, c_void};
use nss_sys::nspr::{PR_ErrorToName, PR_GetError, PR_SetError, PRBool};
use nss_sys::{PK11SlotInfo, SECItem, SECItemType, error};
use vscard_protocol::Secret;
use zeroize::Zeroizing;

const NSS_INIT_READONLY: u32 = 0x1;
const NSS_INIT_NOCERTDB: u32 = 0x2;
const NSS_INIT_NOMODDB: u32 = 0x4;
const NSS_INIT_FORCEOPEN: u32 = 0x8;
const NSS_INIT_NOROOTINIT: u32 = 0x10;
const NSS_INIT_PK11THREADSAFE: u32 = 0x40;

const CKM_RSA_PKCS: c_ulong = 1;
const CKM_RSA_X_509: c_ulong = 3;
const CKM_GENERIC_SECRET_KEY_GEN: c_ulong = 0x350;
const CKM_ECDSA: c_ulong = 0x1041;
const CKM_ECDH1_DERIVE: c_ulong = 0x1050;
const CKD_NULL: c_ulong = 1;
const CKF_DONT_BLOCK: c_ulong = 1;
const PK11_ORIGIN_NULL: c_int = 0;
const PK11_TYPE_GENERIC: c_int = 0;
const PK11_TYPE_PRIVATE_KEY: c_int = 1;
const SEC_SUCCESS: c_int = 0;
const SEC_WOULD_BLOCK: c_int = -2;

/// Opaque C types, reached through pointers only.
#[repr(C)]
struct InitContext([u8; 0]);
#[repr(C)]
struct GenericObject([u8; 0]);
#[repr(C)]
struct SymKey([u8; 0]);
#[repr(C)]
struct ListLock([u8; 0]);

/// The beginning of a `SECMODModule`, the same from 3.12 to 3.124. Only ever read through a pointer.
#[repr(C)]
struct SecmodModule {
    arena: *mut c_void,
    internal: PRBool,
    loaded: PRBool,
    is_fips: PRBool,
    library_name: *mut c_char,
    common_name: *mut c_char,
    library: *mut c_void,
    functions: *mut c_void,
    reference_lock: *mut c_void,
    references: c_int,
    slots: *mut *mut PK11SlotInfo,
    slot_count: c_int,
}

/// The beginning of a `SECKEYPrivateKey`, the same from 3.12 to 3.124. Only ever read through a pointer.
#[repr(C)]
struct SeckeyPrivateKey {
    arena: *mut c_void,
    kind: c_int,
    slot: *mut PK11SlotInfo,
    handle: c_ulong,
}

/// `CK_ATTRIBUTE` (PKCS #11 v2.40 §3.3).
#[repr(C)]
struct CkAttribute {
    kind: c_ulong,
    value: *mut c_void,
    len: c_ulong,
}

/// `CK_ECDH1_DERIVE_PARAMS` (PKCS #11 v2.40 mechanisms §2.3.7).
#[repr(C)]
struct CkEcdh1DeriveParams {
    kdf: c_ulong,
    shared_len: c_ulong,
    shared: *mut c_uchar,
    public_len: c_ulong,
    public: *mut c_uchar,
}

/// `CK_TOKEN_INFO` (PKCS #11 v2.40 §3.2).
#[repr(C)]
struct CkTokenInfo {
    label: [u8; 32],
    manufacturer: [u8; 32],
    model: [u8; 16],
    serial_number: [u8; 16],
    flags: c_ulong,
    counts: [c_ulong; 10],
    versions: [u8; 4],
    time: [u8; 16],
}

/// Asks for a password; what it gives is wiped and freed by NSS.
type PasswordFunction = extern "C" fn(*mut PK11SlotInfo, PRBool, *mut c_void) -> *mut c_char;

#[allow(non_snake_case)]
unsafe extern "C" {
    fn NSS_InitContext(
        directory: *const c_char,
        certificate_prefix: *const c_char,
        key_prefix: *const c_char,
        module_database: *const c_char,
        parameters: *mut c_void,
        flags: u32,
    ) -> *mut InitContext;

    fn SECMOD_OpenUserDB(spec: *const c_char) -> *mut PK11SlotInfo;
    fn SECMOD_CloseUserDB(slot: *mut PK11SlotInfo) -> c_int;
    fn PK11_FreeSlot(slot: *mut PK11SlotInfo);
    fn PK11_NeedLogin(slot: *mut PK11SlotInfo) -> PRBool;
    fn PK11_IsLoggedIn(slot: *mut PK11SlotInfo, window: *mut c_void) -> PRBool;
    fn PK11_CheckUserPassword(slot: *mut PK11SlotInfo, password: *const c_char) -> c_int;
    fn PK11_Logout(slot: *mut PK11SlotInfo) -> c_int;
    fn PK11_SetPasswordFunc(function: PasswordFunction);
    fn PORT_Strdup(text: *const c_char) -> *mut c_char;

    fn SECMOD_LoadUserModule(
        spec: *mut c_char,
        parent: *mut SecmodModule,
        recurse: PRBool,
    ) -> *mut SecmodModule;
    fn SECMOD_DestroyModule(module: *mut SecmodModule);
    fn SECMOD_GetDefaultModuleListLock() -> *mut ListLock;
    fn SECMOD_GetReadLock(lock: *mut ListLock);
    fn SECMOD_ReleaseReadLock(lock: *mut ListLock);
    fn SECMOD_WaitForAnyTokenEvent(
        module: *mut SecmodModule,
        flags: c_ulong,
        latency: u32,
    ) -> *mut PK11SlotInfo;
    fn PK11_ReferenceSlot(slot: *mut PK11SlotInfo) -> *mut PK11SlotInfo;
    fn PK11_IsPresent(slot: *mut PK11SlotInfo) -> PRBool;
    fn PK11_IsInternal(slot: *mut PK11SlotInfo) -> PRBool;
    fn PK11_GetSlotSeries(slot: *mut PK11SlotInfo) -> c_int;
    fn PK11_GetSlotID(slot: *mut PK11SlotInfo) -> c_ulong;
    fn PK11_GetTokenInfo(slot: *mut PK11SlotInfo, info: *mut CkTokenInfo) -> c_int;
    fn PK11_DoesMechanism(slot: *mut PK11SlotInfo, mechanism: c_ulong) -> PRBool;

    fn PK11_FindGenericObjects(slot: *mut PK11SlotInfo, class: c_ulong) -> *mut GenericObject;
    fn PK11_GetNextGenericObject(object: *mut GenericObject) -> *mut GenericObject;
    fn PK11_DestroyGenericObjects(objects: *mut GenericObject) -> c_int;
    fn PK11_ReadRawAttribute(
        object_type: c_int,
        object: *mut c_void,
        attribute: c_ulong,
        value: *mut SECItem,
    ) -> c_int;
    fn SECITEM_ZfreeItem(item: *mut SECItem, free_item: PRBool);

    fn PK11_FindKeyByKeyID(
        slot: *mut PK11SlotInfo,
        id: *mut SECItem,
        window: *mut c_void,
    ) -> *mut SeckeyPrivateKey;
    fn PK11_CopyTokenPrivKeyToSessionPrivKey(
        slot: *mut PK11SlotInfo,
        key: *mut SeckeyPrivateKey,
    ) -> *mut SeckeyPrivateKey;
    fn SECKEY_DestroyPrivateKey(key: *mut SeckeyPrivateKey);
    fn PK11_PubDecryptRaw(
        key: *mut SeckeyPrivateKey,
        out: *mut c_uchar,
        out_len: *mut c_uint,
        max: c_uint,
        input: *const c_uchar,
        input_len: c_uint,
    ) -> c_int;
    fn PK11_PrivDecryptPKCS1(
        key: *mut SeckeyPrivateKey,
        out: *mut c_uchar,
        out_len: *mut c_uint,
        max: c_uint,
        input: *const c_uchar,
        input_len: c_uint,
    ) -> c_int;
    fn PK11_SignWithMechanism(
        key: *mut SeckeyPrivateKey,
        mechanism: c_ulong,
        parameter: *const SECItem,
        signature: *mut SECItem,
        input: *const SECItem,
    ) -> c_int;

    fn PK11_SymKeyFromHandle(
        slot: *mut PK11SlotInfo,
        parent: *mut SymKey,
        origin: c_int,
        mechanism: c_ulong,
        handle: c_ulong,
        owner: PRBool,
        window: *mut c_void,
    ) -> *mut SymKey;
    fn PK11_DeriveWithTemplate(
        base: *mut SymKey,
        derive: c_ulong,
        parameter: *mut SECItem,
        target: c_ulong,
        operation: c_ulong,
        key_size: c_int,
        attributes: *mut CkAttribute,
        count: c_uint,
        permanent: PRBool,
    ) -> *mut SymKey;
    fn PK11_ExtractKeyValue(key: *mut SymKey) -> c_int;
    fn PK11_GetKeyData(key: *mut SymKey) -> *mut SECItem;
    fn PK11_FreeSymKey(key: *mut SymKey);
}

/// The error NSS left behind; 0 if it left none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NssError(c_int);

impl NssError {
    pub(super) const LOCKED_PASSWORD: Self = Self(error::SEC_ERROR_LOCKED_PASSWORD);
    /// Of a module: it does not start for several threads.
    pub(super) const INCOMPATIBLE_MODULE: Self = Self(error::SEC_ERROR_INCOMPATIBLE_PKCS11);
    pub(super) const NO_SLOT_SELECTED: Self = Self(error::SEC_ERROR_NO_SLOT_SELECTED);
    /// `SSL_ERROR_NO_CERTIFICATE`, with which NSS says "no such object". Its name is in libssl3's table,
    /// which is not loaded.
    pub(super) const NO_SUCH_OBJECT: Self = Self(-12285);

    /// Whether a search failed only because nothing was there.
    fn is_not_found(self) -> bool {
        self == Self(0) || self == Self::NO_SUCH_OBJECT
    }
}

impl fmt::Display for NssError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("no reason given by NSS");
        }
        if *self == Self::NO_SUCH_OBJECT {
            return write!(f, "SSL_ERROR_NO_CERTIFICATE, no such object ({})", self.0);
        }
        // SAFETY: takes any number and only looks it up in tables; one that no table has gives null.
        let name = unsafe { PR_ErrorToName(self.0) };
        if name.is_null() {
            return write!(f, "NSS error {}", self.0);
        }
        // SAFETY: not null, and points to a C string in a static table.
        let name = unsafe { CStr::from_ptr(name) };
        write!(f, "{} ({})", name.to_string_lossy(), self.0)
    }
}

/// Runs one NSS call and reads the error if `call` gives `None`.
fn attempt<T>(call: impl FnOnce() -> Option<T>) -> Result<T, NssError> {
    // SAFETY: sets this thread's error. Needed because a call that finds nothing often sets none.
    unsafe { PR_SetError(0, 0) };
    call().ok_or_else(|| {
        // SAFETY: reads this thread's error.
        NssError(unsafe { PR_GetError() })
    })
}

fn succeeded(status: c_int) -> Option<()> {
    (status == SEC_SUCCESS).then_some(())
}

/// Starts NSS without any database, once per process. It is never shut down: a handle that outlived the
/// shutdown would dangle.
fn start() -> Result<(), NssError> {
    static STARTED: OnceLock<Result<(), NssError>> = OnceLock::new();
    *STARTED.get_or_init(|| {
        let flags = NSS_INIT_READONLY
            | NSS_INIT_NOCERTDB
            | NSS_INIT_NOMODDB
            | NSS_INIT_FORCEOPEN
            | NSS_INIT_NOROOTINIT
            // A module that is not made for several threads is refused.
            | NSS_INIT_PK11THREADSAFE;
        let (none, module_database) = (c"".as_ptr(), c"secmod.db".as_ptr());
        attempt(|| {
            // SAFETY: five C strings that outlive the call, and no parameters, which NSS allows.
            let context =
                unsafe { NSS_InitContext(none, none, none, module_database, ptr::null_mut(), flags) };
            (!context.is_null()).then_some(())
        })
    })
}

/// Why a slot did not open.
pub(super) enum SlotError {
    /// NSS itself did not start.
    Start(NssError),
    /// NSS did not take the database.
    Open(NssError),
}

/// What became of a password.
pub(super) enum Login {
    Accepted,
    Wrong,
    NotChecked(NssError),
}

/// A PKCS#11 slot: a database, opened as a slot of its own with a login state of its own and closed on drop, or a
/// slot of a [`Module`].
///
/// A key made by NSS would work on the next database that gets the number of a closed slot, so keys hold an
/// `Arc` of their slot.
pub(super) struct Slot {
    raw: NonNull<PK11SlotInfo>,
    database: bool,
}

// SAFETY: a PK11SlotInfo is reference counted and locked inside NSS and belongs to no thread.
unsafe impl Send for Slot {}
// SAFETY: as above; every function called with it here may be called by several threads at once, and what is behind it is
// NSS's own token or a module that was initialised for several threads: others do not load (NSS_INIT_PK11THREADSAFE).
unsafe impl Sync for Slot {}

/// NSS picks a free slot number and fills that slot in two steps without a lock around both.
static OPENING: Mutex<()> = Mutex::new(());

impl Slot {
    pub(super) fn open(spec: &CStr) -> Result<Arc<Self>, SlotError> {
        start().map_err(SlotError::Start)?;
        let _opening = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
        attempt(|| {
            // SAFETY: a C string that outlives the call, and NSS has started.
            NonNull::new(unsafe { SECMOD_OpenUserDB(spec.as_ptr()) })
        })
        .map(|raw| Arc::new(Self { raw, database: true }))
        .map_err(SlotError::Open)
    }

    /// Whether there is a token in the slot. Until it was called after an insertion, logins fail.
    pub(super) fn is_present(&self) -> bool {
        // SAFETY: the slot is alive.
        unsafe { PK11_IsPresent(self.raw.as_ptr()) != 0 }
    }

    /// Another number than before is another insertion.
    pub(super) fn series(&self) -> i32 {
        // SAFETY: the slot is alive.
        unsafe { PK11_GetSlotSeries(self.raw.as_ptr()) }
    }

    /// Whether the token of the insertion with that [`series`](Self::series) is in.
    pub(super) fn holds(&self, series: i32) -> bool {
        // NSS notices another insertion only when it is asked whether a token is there.
        self.is_present() && self.series() == series
    }

    /// The slot's number in its module.
    pub(super) fn id(&self) -> c_ulong {
        // SAFETY: the slot is alive.
        unsafe { PK11_GetSlotID(self.raw.as_ptr()) }
    }

    /// Whether it is one of NSS's own, not of a module.
    pub(super) fn is_internal(&self) -> bool {
        // SAFETY: the slot is alive.
        unsafe { PK11_IsInternal(self.raw.as_ptr()) != 0 }
    }

    pub(super) fn has_mechanism(&self, mechanism: Mechanism) -> bool {
        // SAFETY: the slot is alive.
        unsafe { PK11_DoesMechanism(self.raw.as_ptr(), mechanism as c_ulong) != 0 }
    }

    /// What the token says of itself now.
    pub(super) fn token_info(&self) -> Result<TokenInfo, NssError> {
        let mut info = CkTokenInfo {
            label: [0; 32],
            manufacturer: [0; 32],
            model: [0; 16],
            serial_number: [0; 16],
            flags: 0,
            counts: [0; 10],
            versions: [0; 4],
            time: [0; 16],
        };
        attempt(|| {
            // SAFETY: the slot is alive; `info` is ours and has the layout of a CK_TOKEN_INFO, every bit
            // pattern of which is valid.
            succeeded(unsafe { PK11_GetTokenInfo(self.raw.as_ptr(), &mut info) })
        })?;
        let text = |field: &[u8]| String::from_utf8_lossy(field).trim_end_matches([' ', '\0']).to_owned();
        Ok(TokenInfo {
            label: text(&info.label),
            manufacturer: text(&info.manufacturer),
            model: text(&info.model),
            serial_number: text(&info.serial_number),
            flags: info.flags,
            max_pin: info.counts[4],
            min_pin: info.counts[5],
        })
    }

    /// Whether private keys are behind a password.
    pub(super) fn needs_login(&self) -> bool {
        // SAFETY: the slot is alive.
        unsafe { PK11_NeedLogin(self.raw.as_ptr()) != 0 }
    }

    /// Logs out, then in with `password`.
    pub(super) fn log_in(&self, password: &CStr) -> Login {
        let mut status = SEC_SUCCESS;
        let result = attempt(|| {
            // SAFETY: the slot is alive, and the C string outlives the call.
            status = unsafe { PK11_CheckUserPassword(self.raw.as_ptr(), password.as_ptr()) };
            succeeded(status)
        });
        match result {
            Ok(()) => Login::Accepted,
            Err(_) if status == SEC_WOULD_BLOCK => Login::Wrong,
            Err(error) => Login::NotChecked(error),
        }
    }

    /// Whether the token itself says that its user is logged in.
    pub(super) fn is_logged_in(&self) -> bool {
        // SAFETY: the slot is alive, and no window is needed as nothing is asked of anybody.
        unsafe { PK11_IsLoggedIn(self.raw.as_ptr(), ptr::null_mut()) != 0 }
    }

    pub(super) fn log_out(&self) {
        // SAFETY: the slot is alive. It fails when nobody is logged in, which is what is wanted.
        unsafe { PK11_Logout(self.raw.as_ptr()) };
    }

    /// The objects of `class` that are visible now.
    pub(super) fn objects(&self, class: Class) -> Result<Objects<'_>, NssError> {
        let found = attempt(|| {
            // SAFETY: the slot is alive.
            NonNull::new(unsafe { PK11_FindGenericObjects(self.raw.as_ptr(), class as c_ulong) })
        });
        let first = match found {
            Ok(first) => Some(first),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(error),
        };
        Ok(Objects { first, slot: PhantomData })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let _opening = self.database.then(|| OPENING.lock().unwrap_or_else(PoisonError::into_inner));
        if self.database {
            // SAFETY: `raw` came from SECMOD_OpenUserDB and is closed once. No key of ours is left, each holds
            // the slot.
            unsafe { SECMOD_CloseUserDB(self.raw.as_ptr()) };
        }
        // SAFETY: `raw` came with one reference, given back here once.
        unsafe { PK11_FreeSlot(self.raw.as_ptr()) };
    }
}

/// What a token says of itself. The texts have no padding.
pub(super) struct TokenInfo {
    pub(super) label: String,
    pub(super) manufacturer: String,
    pub(super) model: String,
    pub(super) serial_number: String,
    flags: c_ulong,
    max_pin: c_ulong,
    min_pin: c_ulong,
}

impl TokenInfo {
    /// Whether both are of one token, as far as that can be told.
    pub(super) fn is_of_same_token(&self, other: &Self) -> bool {
        self.names() == other.names()
    }

    fn names(&self) -> [&String; 4] {
        [&self.label, &self.manufacturer, &self.model, &self.serial_number]
    }

    /// CKF_TOKEN_INITIALIZED.
    pub(super) fn is_initialized(&self) -> bool {
        self.flags & 0x400 != 0
    }

    /// CKF_LOGIN_REQUIRED.
    pub(super) fn needs_login(&self) -> bool {
        self.flags & 0x4 != 0
    }

    /// How many bytes its PIN has, by ulMinPinLen and ulMaxPinLen; a token that does not know them may say 0, or
    /// CK_UNAVAILABLE_INFORMATION.
    pub(super) fn pin_lengths(&self) -> std::ops::RangeInclusive<usize> {
        let length = |length| usize::try_from(length).unwrap_or(usize::MAX);
        match (length(self.min_pin), length(self.max_pin)) {
            (min, max) if min <= max && max != 0 && min != usize::MAX => min..=max,
            _ => 0..=usize::MAX,
        }
    }

    /// CKF_PROTECTED_AUTHENTICATION_PATH: the PIN is typed on the token or its reader.
    pub(super) fn has_pin_pad(&self) -> bool {
        self.flags & 0x100 != 0
    }

    /// CKF_USER_PIN_FINAL_TRY.
    pub(super) fn is_final_try(&self) -> bool {
        self.flags & 0x2_0000 != 0
    }

    /// CKF_USER_PIN_LOCKED.
    pub(super) fn is_locked(&self) -> bool {
        self.flags & 0x4_0000 != 0
    }

    /// CKF_USER_PIN_COUNT_LOW: a wrong PIN was given since the last right one. A token may leave that to the flags for
    /// what comes of it.
    pub(super) fn is_count_low(&self) -> bool {
        self.flags & 0x1_0000 != 0 || self.is_final_try() || self.is_locked()
    }
}

/// A PKCS#11 mechanism.
#[derive(Clone, Copy)]
pub(super) enum Mechanism {
    RsaPkcs = CKM_RSA_PKCS as isize,
    RsaRaw = CKM_RSA_X_509 as isize,
    Ecdsa = CKM_ECDSA as isize,
    Ecdh = CKM_ECDH1_DERIVE as isize,
}

/// A PKCS#11 module. It stays loaded to the end of the process, as NSS stays started.
pub(super) struct Module {
    raw: NonNull<SecmodModule>,
    /// NSS wants one thread per module to ask for events.
    polling: Mutex<()>,
}

// SAFETY: a SECMODModule is reference counted and locked inside NSS and belongs to no thread.
unsafe impl Send for Module {}
// SAFETY: as above, and the module was initialised for several threads. What of it is read here changes under NSS's
// list lock only, which is held then.
unsafe impl Sync for Module {}

impl Module {
    /// Loads the module that `spec` describes, and initialises it.
    pub(super) fn load(spec: &CStr) -> Result<Self, NssError> {
        static CALLBACK: OnceLock<()> = OnceLock::new();
        start()?;
        CALLBACK.get_or_init(|| {
            // SAFETY: the function lives for ever and upholds what NSS asks of it.
            unsafe { PK11_SetPasswordFunc(give_pin) };
        });
        attempt(|| {
            // SAFETY: NSS only reads the spec; there is no parent.
            let raw =
                NonNull::new(unsafe { SECMOD_LoadUserModule(spec.as_ptr().cast_mut(), ptr::null_mut(), 0) })?;
            // SAFETY: not null, so a module, even if loading failed.
            if unsafe { (*raw.as_ptr()).loaded } != 0 {
                return Some(Self { raw, polling: Mutex::new(()) });
            }
            // SAFETY: reads this thread's error.
            let error = unsafe { PR_GetError() };
            // SAFETY: our reference, given back once; after that the error is put back.
            unsafe {
                SECMOD_DestroyModule(raw.as_ptr());
                PR_SetError(error, 0);
            }
            None
        })
    }

    /// Its slots, with and without tokens, at most `max`.
    pub(super) fn slots(&self, max: usize) -> Vec<Arc<Slot>> {
        // SAFETY: NSS has started, so there is a lock, and it is released below.
        let lock = unsafe { SECMOD_GetDefaultModuleListLock() };
        // SAFETY: as above.
        unsafe { SECMOD_GetReadLock(lock) };
        // SAFETY: the module is alive, and the two fields belong together while the lock is held.
        let (slots, count) = unsafe { ((*self.raw.as_ptr()).slots, (*self.raw.as_ptr()).slot_count) };
        let count = usize::try_from(count).unwrap_or(0).min(max);
        let found = (0..if slots.is_null() { 0 } else { count })
            .filter_map(|index| {
                // SAFETY: below the count of the array, which holds live slots; the reference taken is the
                // Slot's own.
                NonNull::new(unsafe { PK11_ReferenceSlot(*slots.add(index)) })
            })
            .map(|raw| Arc::new(Slot { raw, database: false }))
            .collect();
        // SAFETY: locked above.
        unsafe { SECMOD_ReleaseReadLock(lock) };
        found
    }

    /// Whether something happened in one of its slots since the last call.
    pub(super) fn poll_event(&self) -> bool {
        let _polling = self.polling.lock().unwrap_or_else(PoisonError::into_inner);
        let event = attempt(|| {
            // SAFETY: the module is alive; with this flag the call does not wait.
            NonNull::new(unsafe { SECMOD_WaitForAnyTokenEvent(self.raw.as_ptr(), CKF_DONT_BLOCK, 0) })
        });
        match event {
            Ok(slot) => {
                // SAFETY: the reference is ours, given back once.
                unsafe { PK11_FreeSlot(slot.as_ptr()) };
                true
            }
            Err(_) => false,
        }
    }
}

/// The PINs that always-authenticate keys may ask for, by the number of the window their key was found with.
static PINS: Mutex<BTreeMap<usize, ArmedPin>> = Mutex::new(BTreeMap::new());

fn pins() -> MutexGuard<'static, BTreeMap<usize, ArmedPin>> {
    PINS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A PIN for one insertion of one token.
struct ArmedPin {
    pin: Secret,
    /// The address of the slot.
    slot: usize,
    series: c_int,
}

/// Takes the PIN that may be asked for. What is asked for by another slot, or for the token that came after, is gone, too.
fn take_pin(window: usize, slot: usize, series: impl FnOnce() -> c_int) -> Option<Secret> {
    let armed = pins().remove(&window)?;
    (armed.slot == slot && armed.series == series()).then_some(armed.pin)
}

/// What NSS calls a window: names whom it asks for a PIN. It is a number, never followed as a pointer.
///
/// NSS asks when a key wants the PIN for each operation (CKA_ALWAYS_AUTHENTICATE), and also, of itself, when it
/// finds a slot logged out: so it is given a PIN only while there is one armed, and once.
pub(super) struct Window(usize);

impl Window {
    pub(super) fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// While the result lives, the PIN may be asked for, once, for the token that is in the slot with this
    /// [`Slot::series`].
    pub(super) fn arm(&self, pin: Secret, slot: &Slot, series: i32) -> Armed<'_> {
        pins().insert(self.0, ArmedPin { pin, slot: slot.raw.as_ptr().addr(), series });
        Armed(self)
    }
}

/// A PIN that NSS may ask for.
pub(super) struct Armed<'window>(&'window Window);

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        pins().remove(&self.0.0);
    }
}

/// The password callback of the process. A database's keys have no window, and get nothing.
extern "C" fn give_pin(slot: *mut PK11SlotInfo, retry: PRBool, window: *mut c_void) -> *mut c_char {
    if retry != 0 {
        // It was wrong: asked again with the same PIN, the token would lose all its tries.
        return ptr::null_mut();
    }
    let series = || {
        // SAFETY: the slot that NSS asks for, which is alive meanwhile.
        unsafe { PK11_GetSlotSeries(slot) }
    };
    let Some(pin) = take_pin(window.addr(), slot.addr(), series) else { return ptr::null_mut() };
    let mut text = Zeroizing::new(Vec::with_capacity(pin.len() + 1));
    text.extend_from_slice(pin.expose());
    text.push(0);
    match CStr::from_bytes_with_nul(&text) {
        // SAFETY: a C string, which is copied; NSS owns the copy.
        Ok(text) => unsafe { PORT_Strdup(text.as_ptr()) },
        Err(_) => ptr::null_mut(),
    }
}

/// A PKCS#11 object class.
#[derive(Clone, Copy)]
pub(super) enum Class {
    Certificate = 1,
    PublicKey = 2,
    #[cfg(test)]
    PrivateKey = 3,
}

/// A PKCS#11 attribute that is no secret.
#[derive(Clone, Copy)]
pub(super) enum Attribute {
    Label = 0x3,
    Value = 0x11,
    Id = 0x102,
    Modulus = 0x120,
    EcPoint = 0x181,
    AlwaysAuthenticate = 0x202,
}

const CKA_TOKEN: c_ulong = 0x1;
const CKA_EXTRACTABLE: c_ulong = 0x162;
/// The tag, DER.
const OCTET_STRING: u8 = 0x04;

/// The result of a search. Objects are raw PKCS#11, never `CERTCertificate`: NSS caches those for the whole
/// process by issuer and serial number and mixes up certificates and keys of two databases.
pub(super) struct Objects<'slot> {
    first: Option<NonNull<GenericObject>>,
    slot: PhantomData<&'slot Slot>,
}

impl Objects<'_> {
    pub(super) fn iter(&self) -> impl Iterator<Item = Object<'_>> {
        std::iter::successors(self.first, |object| {
            // SAFETY: a live object of the list, whose end is null.
            NonNull::new(unsafe { PK11_GetNextGenericObject(object.as_ptr()) })
        })
        .map(|raw| Object { raw, list: PhantomData })
    }
}

impl Drop for Objects<'_> {
    fn drop(&mut self) {
        if let Some(first) = self.first {
            // SAFETY: the head of a whole list, freed once; an `Object` cannot outlive the list.
            unsafe { PK11_DestroyGenericObjects(first.as_ptr()) };
        }
    }
}

pub(super) struct Object<'list> {
    raw: NonNull<GenericObject>,
    list: PhantomData<&'list ()>,
}

impl Object<'_> {
    pub(super) fn attribute(&self, attribute: Attribute) -> Result<Vec<u8>, NssError> {
        // SAFETY: a live generic object, as its list is borrowed.
        unsafe { read_attribute(PK11_TYPE_GENERIC, self.raw.as_ptr().cast(), attribute as c_ulong) }
    }
}

/// # Safety
/// `object` must be alive and of the C type that `object_type` says.
unsafe fn read_attribute(
    object_type: c_int,
    object: *mut c_void,
    attribute: c_ulong,
) -> Result<Vec<u8>, NssError> {
    let mut item = SECItem { type_: SECItemType::siBuffer, data: ptr::null_mut(), len: 0 };
    // On failure `item` may point to memory that NSS has freed, so it is not looked at then.
    attempt(|| {
        // SAFETY: the caller vouches for the object; `item` is ours.
        succeeded(unsafe { PK11_ReadRawAttribute(object_type, object, attribute, &mut item) })
    })?;
    let value = if item.data.is_null() {
        Vec::new()
    } else {
        // SAFETY: on success NSS gives `len` initialised bytes.
        unsafe { std::slice::from_raw_parts(item.data, item.len as usize) }.to_vec()
    };
    // SAFETY: the buffer was allocated by NSS and is freed once; the item itself is on our stack.
    unsafe { SECITEM_ZfreeItem(&mut item, 0) };
    Ok(value)
}

/// An item that NSS only reads. It must not outlive `bytes`.
fn borrowed_item(bytes: &[u8]) -> Option<SECItem> {
    let len = c_uint::try_from(bytes.len()).ok()?;
    Some(SECItem { type_: SECItemType::siBuffer, data: bytes.as_ptr().cast_mut(), len })
}

/// A private key; destroyed on drop, before its slot closes. A session copy is wiped by that.
pub(super) struct PrivateKey {
    raw: NonNull<SeckeyPrivateKey>,
    slot: Arc<Slot>,
}

// SAFETY: a SECKEYPrivateKey is a handle that belongs to no thread.
unsafe impl Send for PrivateKey {}

impl PrivateKey {
    /// The key whose CKA_ID is `id`; `None` if there is none, or none visible before login.
    /// Without a window, NSS is never given a PIN for it.
    pub(super) fn find(
        slot: &Arc<Slot>,
        id: &[u8],
        window: Option<&Window>,
    ) -> Result<Option<Self>, NssError> {
        let window = ptr::without_provenance_mut(window.map_or(0, |window| window.0));
        let found = attempt(|| {
            let mut id = borrowed_item(id)?;
            // SAFETY: the slot is alive, and NSS only reads the item. The window is a number that reaches our
            // password callback alone.
            NonNull::new(unsafe { PK11_FindKeyByKeyID(slot.raw.as_ptr(), &mut id, window) })
        });
        match found {
            Ok(raw) => Ok(Some(Self { raw, slot: Arc::clone(slot) })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A copy that lives in memory until it is dropped, through logouts too.
    pub(super) fn session_copy(&self) -> Result<Self, NssError> {
        attempt(|| {
            // SAFETY: slot and key are alive.
            NonNull::new(unsafe {
                PK11_CopyTokenPrivKeyToSessionPrivKey(self.slot.raw.as_ptr(), self.raw.as_ptr())
            })
        })
        .map(|raw| Self { raw, slot: Arc::clone(&self.slot) })
    }

    pub(super) fn attribute(&self, attribute: Attribute) -> Result<Vec<u8>, NssError> {
        // SAFETY: a live private key.
        unsafe { read_attribute(PK11_TYPE_PRIVATE_KEY, self.raw.as_ptr().cast(), attribute as c_ulong) }
    }

    pub(super) fn slot(&self) -> &Slot {
        &self.slot
    }

    /// Raw RSA as decryption, for which the key needs CKA_DECRYPT. Gives the number of bytes written to
    /// `out`.
    pub(super) fn rsa_decrypt_raw(&self, block: &[u8], out: &mut [u8]) -> Result<usize, NssError> {
        let mut written: c_uint = 0;
        attempt(|| {
            let max = c_uint::try_from(out.len()).ok()?;
            let len = c_uint::try_from(block.len()).ok()?;
            // SAFETY: the key is alive; NSS writes at most `max` bytes to `out` and reads `len` bytes of
            // `block`.
            succeeded(unsafe {
                PK11_PubDecryptRaw(
                    self.raw.as_ptr(),
                    out.as_mut_ptr(),
                    &mut written,
                    max,
                    block.as_ptr(),
                    len,
                )
            })
        })?;
        Ok(written as usize)
    }

    /// RSA decryption with the padding of PKCS #1 v1.5 taken off. Gives the number of bytes written to `out`.
    pub(super) fn rsa_decrypt_pkcs1(&self, block: &[u8], out: &mut [u8]) -> Result<usize, NssError> {
        let mut written: c_uint = 0;
        attempt(|| {
            let max = c_uint::try_from(out.len()).ok()?;
            let len = c_uint::try_from(block.len()).ok()?;
            // SAFETY: as for PK11_PubDecryptRaw.
            succeeded(unsafe {
                PK11_PrivDecryptPKCS1(
                    self.raw.as_ptr(),
                    out.as_mut_ptr(),
                    &mut written,
                    max,
                    block.as_ptr(),
                    len,
                )
            })
        })?;
        Ok(written as usize)
    }

    /// A signature over `input` as `mechanism` makes it, for which the key needs CKA_SIGN. Gives the number of
    /// bytes written to `out`.
    pub(super) fn sign(&self, mechanism: Mechanism, input: &[u8], out: &mut [u8]) -> Result<usize, NssError> {
        let mut written: c_uint = 0;
        attempt(|| {
            let input = borrowed_item(input)?;
            let mut signature = SECItem {
                type_: SECItemType::siBuffer,
                data: out.as_mut_ptr(),
                len: c_uint::try_from(out.len()).ok()?,
            };
            // SAFETY: the key is alive; NSS reads `input` and writes to `signature` at most the length it
            // holds, then sets the length it wrote.
            let status = unsafe {
                PK11_SignWithMechanism(
                    self.raw.as_ptr(),
                    mechanism as c_ulong,
                    ptr::null(),
                    &mut signature,
                    &input,
                )
            };
            written = signature.len;
            succeeded(status)
        })?;
        Ok(written as usize)
    }

    /// The x coordinate of ECDH with another key's point, `len` bytes. No key derivation function is applied.
    pub(super) fn ecdh(&self, point: &[u8], len: usize) -> Result<Secret, NssError> {
        // PKCS #11 v2.40 mechanisms §2.3.7: all tokens take the point itself, some before 2.20 an OCTET STRING.
        let shared = self.derive(point, len).or_else(|error| {
            let header = [OCTET_STRING, u8::try_from(point.len()).map_err(|_| error)?];
            self.derive(&[&header, point].concat(), len)
        })?;
        attempt(|| {
            // SAFETY: a live key of ours.
            succeeded(unsafe { PK11_ExtractKeyValue(shared.0.as_ptr()) })
        })?;
        // SAFETY: a live key of ours, whose item lives as long as it.
        let item = unsafe { &*PK11_GetKeyData(shared.0.as_ptr()) };
        if item.data.is_null() {
            return Err(NssError(0));
        }
        // SAFETY: after the extraction the item holds `len` initialised bytes.
        Ok(Secret::from(unsafe { std::slice::from_raw_parts(item.data, item.len as usize) }))
    }

    /// NSS's own function for this sends no CKA_TOKEN, without which OpenSC (0.23) derives nothing. The one that
    /// sends what it is told wants a symmetric key, so for the time of the call the private key's handle is one.
    fn derive(&self, point: &[u8], len: usize) -> Result<SymmetricKey, NssError> {
        let mut point = point.to_vec();
        let mut parameters = CkEcdh1DeriveParams {
            kdf: CKD_NULL,
            shared_len: 0,
            shared: ptr::null_mut(),
            public_len: point.len() as c_ulong,
            public: point.as_mut_ptr(),
        };
        let mut parameter = SECItem {
            type_: SECItemType::siBuffer,
            data: ptr::from_mut(&mut parameters).cast(),
            len: size_of::<CkEcdh1DeriveParams>() as c_uint,
        };
        let mut no: c_uchar = 0;
        let mut attributes = [CkAttribute { kind: CKA_TOKEN, value: ptr::from_mut(&mut no).cast(), len: 1 }];
        let base = attempt(|| {
            // SAFETY: the key is alive, and its beginning is as declared. NSS takes a reference to the slot, and does
            // not destroy what is behind a handle that it does not own.
            NonNull::new(unsafe {
                let handle = (*self.raw.as_ptr()).handle;
                let slot = self.slot.raw.as_ptr();
                PK11_SymKeyFromHandle(
                    slot,
                    ptr::null_mut(),
                    PK11_ORIGIN_NULL,
                    CKM_ECDH1_DERIVE,
                    handle,
                    0,
                    ptr::null_mut(),
                )
            })
        })
        .map(SymmetricKey)?;
        attempt(|| {
            // SAFETY: the base key, the parameters with the point, and the attribute with its value are alive and
            // only read. CKA_EXTRACTABLE stands where NSS takes what the new key is for: it is set to true, without
            // which some tokens keep the value.
            NonNull::new(unsafe {
                PK11_DeriveWithTemplate(
                    base.0.as_ptr(),
                    CKM_ECDH1_DERIVE,
                    &mut parameter,
                    CKM_GENERIC_SECRET_KEY_GEN,
                    CKA_EXTRACTABLE,
                    c_int::try_from(len).ok()?,
                    attributes.as_mut_ptr(),
                    attributes.len() as c_uint,
                    0,
                )
            })
        })
        .map(SymmetricKey)
    }
}

/// Freed, and wiped by that, on drop.
struct SymmetricKey(NonNull<SymKey>);

impl Drop for SymmetricKey {
    fn drop(&mut self) {
        // SAFETY: ours alone, freed once.
        unsafe { PK11_FreeSymKey(self.0.as_ptr()) };
    }
}

impl Drop for PrivateKey {
    fn drop(&mut self) {
        // SAFETY: ours alone, destroyed once, while `slot` is still open.
        unsafe { SECKEY_DestroyPrivateKey(self.raw.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_for_one_insertion_of_one_token() {
        let window = Window::new();
        let arm = || {
            pins().insert(window.0, ArmedPin { pin: Secret::from(&b"123456"[..]), slot: 8, series: 3 });
            Armed(&window)
        };
        for (slot, series, given) in [(8, 3, true), (16, 3, false), (8, 4, false)] {
            let armed = arm();
            assert_eq!(take_pin(window.0, slot, || series).is_some(), given);
            assert!(take_pin(window.0, 8, || 3).is_none(), "given once");
            drop(armed);
        }
        drop(arm());
        assert!(take_pin(window.0, 8, || 3).is_none(), "no longer armed");
    }
}
