//! The calls into libnss3, and the only `unsafe` of the project.
//!
//! `nss-sys` gives the types and links the library; the functions it lacks are declared here. Results of C
//! type `SECStatus` are taken as `c_int`: an enum value that a newer NSS adds would be undefined behaviour in
//! a Rust enum.
//!
//! What is exported is safe: handles are freed on drop, a key keeps its slot open, and an error is read in
//! the thread and right after the call that failed, because NSS keeps errors per thread and overwrites them
//! freely.

use std::ffi::CStr;
use std::fmt;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libc::{c_char, c_int, c_uchar, c_uint, c_ulong, c_void};
use nss_sys::nspr::{PR_ErrorToName, PR_GetError, PR_SetError, PRBool};
use nss_sys::{PK11SlotInfo, SECItem, SECItemType, error};

const NSS_INIT_READONLY: u32 = 0x1;
const NSS_INIT_NOCERTDB: u32 = 0x2;
const NSS_INIT_NOMODDB: u32 = 0x4;
const NSS_INIT_FORCEOPEN: u32 = 0x8;
const NSS_INIT_NOROOTINIT: u32 = 0x10;

const CKM_RSA_X_509: c_ulong = 3;
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
struct SeckeyPrivateKey([u8; 0]);

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
    fn PK11_CheckUserPassword(slot: *mut PK11SlotInfo, password: *const c_char) -> c_int;
    fn PK11_Logout(slot: *mut PK11SlotInfo) -> c_int;

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
    fn PK11_SignWithMechanism(
        key: *mut SeckeyPrivateKey,
        mechanism: c_ulong,
        parameter: *const SECItem,
        signature: *mut SECItem,
        input: *const SECItem,
    ) -> c_int;
}

/// The error NSS left behind; 0 if it left none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NssError(c_int);

impl NssError {
    pub(super) const LOCKED_PASSWORD: Self = Self(error::SEC_ERROR_LOCKED_PASSWORD);
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
            | NSS_INIT_NOROOTINIT;
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

/// A database, opened as a PKCS#11 slot of its own with a login state of its own; closed on drop.
///
/// A key made by NSS would work on the next database that gets the number of a closed slot, so keys hold an
/// `Arc` of their slot.
pub(super) struct Slot {
    raw: NonNull<PK11SlotInfo>,
}

// SAFETY: a PK11SlotInfo is reference counted and locked inside NSS and belongs to no thread.
unsafe impl Send for Slot {}
// SAFETY: as above; every function called with it here may be called by several threads at once.
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
        .map(|raw| Arc::new(Self { raw }))
        .map_err(SlotError::Open)
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
        let _opening = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `raw` came from SECMOD_OpenUserDB with one reference, given back here once. No key of ours
        // is left, each holds the slot.
        unsafe {
            SECMOD_CloseUserDB(self.raw.as_ptr());
            PK11_FreeSlot(self.raw.as_ptr());
        }
    }
}

/// A PKCS#11 object class.
#[derive(Clone, Copy)]
pub(super) enum Class {
    Certificate = 1,
    PublicKey = 2,
}

/// A PKCS#11 attribute that is no secret.
#[derive(Clone, Copy)]
pub(super) enum Attribute {
    Label = 0x3,
    Value = 0x11,
    Id = 0x102,
}

const CKA_MODULUS: c_ulong = 0x120;

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
    pub(super) fn find(slot: &Arc<Slot>, id: &[u8]) -> Result<Option<Self>, NssError> {
        let found = attempt(|| {
            let mut id = borrowed_item(id)?;
            // SAFETY: the slot is alive, and NSS only reads the item. No password callback is installed, so
            // the window argument reaches nobody.
            NonNull::new(unsafe { PK11_FindKeyByKeyID(slot.raw.as_ptr(), &mut id, ptr::null_mut()) })
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

    /// The RSA modulus, which is public.
    pub(super) fn modulus(&self) -> Result<Vec<u8>, NssError> {
        // SAFETY: a live private key.
        unsafe { read_attribute(PK11_TYPE_PRIVATE_KEY, self.raw.as_ptr().cast(), CKA_MODULUS) }
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

    /// Raw RSA as signature, for which the key needs CKA_SIGN. Gives the number of bytes written to `out`.
    pub(super) fn rsa_sign_raw(&self, block: &[u8], out: &mut [u8]) -> Result<usize, NssError> {
        let mut written: c_uint = 0;
        attempt(|| {
            let input = borrowed_item(block)?;
            let mut signature = SECItem {
                type_: SECItemType::siBuffer,
                data: out.as_mut_ptr(),
                len: c_uint::try_from(out.len()).ok()?,
            };
            // SAFETY: the key is alive; NSS reads `input` and writes to `signature` at most the length it
            // holds, then sets the length it wrote.
            let status = unsafe {
                PK11_SignWithMechanism(self.raw.as_ptr(), CKM_RSA_X_509, ptr::null(), &mut signature, &input)
            };
            written = signature.len;
            succeeded(status)
        })?;
        Ok(written as usize)
    }
}

impl Drop for PrivateKey {
    fn drop(&mut self) {
        // SAFETY: ours alone, destroyed once, while `slot` is still open.
        unsafe { SECKEY_DestroyPrivateKey(self.raw.as_ptr()) };
    }
}
