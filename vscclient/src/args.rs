//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use emulated_card::card::Profile;
use emulated_card::keys::pem::PemSource;
use emulated_card::pcsc::PcscConfig;
use emulated_card::setup::{CardSetup, Keys, OpenCard, RawSetup, SetupError, Wanted, shell_word};
use vscard_protocol::chardev::{Endpoint, Plaintext};

use crate::new_card::{CardDirectory, NewCard};
use crate::{legacy, vpcd};

const LONG_ABOUT: &str = "\
Puts a smartcard into a virtual machine, or into this host's own pcscd: a PIV card or CAC made of certificates and \
keys (an NSS database, PEM or PKCS#12 files, a PKCS#11 token), or the card in a reader as it is. It appears in the \
guest of any VMM that has a VSCard host, such as QEMU's ccid-card-passthru or ccid-device, or through vpcd in pcscd.";

const AFTER_HELP: &str = "\
Examples:
  # QEMU: -usb -device usb-ccid,bus=usb-bus.0
  #       -chardev socket,id=card,path=/run/vm1.sock,server=on,wait=off
  #       -device ccid-card-passthru,chardev=card
  vscclient --db sql:$HOME/certs --cert id --cert sign unix:/run/vm1.sock

  # QEMU connects: -chardev socket,id=card,path=/run/card.sock,reconnect=1
  vscclient --db sql:$HOME/certs --cert id unix-listen:/run/card.sock

  # Key files, or a database without a password: the card gets a PIN of its own
  vscclient --pem card.crt,card.key --pin-file pin.txt tcp:localhost:2001

  # A test card in one command, and another one to put it into this host's pcscd
  vscclient new-card jane --name 'Jane Doe' --pin-file pin.txt
  vscclient card jane --background vpcd:
  kill $(cat jane/vscclient.pid)

  # The guest knows the card's own PIN, and never the password of the database
  vscclient --db sql:$HOME/certs --cert id --pin-file pin.txt --password-file password.txt \\
      unix:/run/vm1.sock

  # The keys of a token, on a PIV card of ours; its PIN is the token's
  vscclient --module /usr/lib/x86_64-linux-gnu/opensc-pkcs11.so unix:/run/vm1.sock

  # The card in a reader of this host, as it is
  vscclient --pcsc 'Yubico*' unix:/run/vm1.sock

  # After too many wrong PINs
  vscclient unlock --db sql:$HOME/certs
  vscclient unlock jane

  # As documentation of the old vscclient has it
  vscclient -e 'db=\"sql:/certs\" use_hw=no soft=(,Reader,CAC,,id,sign)' localhost 2001

Profiles: piv for Windows and macOS, cac for software that knows nothing else (RSA only), dual for \
both; OpenSC takes dual for PIV. Certificates go where their key usage says: 9a authentication, \
9c signature, 9d encryption, 9e card authentication (no PIN), 82 to 95 what is left.

Files with secrets hold one line and are readable by you alone. FILE may be fd:N, an inherited \
descriptor, or a credential of systemd: --password-file ${CREDENTIALS_DIRECTORY}/password.

As a service with Type=notify it is ready when pcscd's programs see the card (vpcd:), else when it \
listens or begins to connect.

Commands on a terminal: insert, remove, select, list, debug, help, exit.

Exit status:
  0  ended by SIGINT, SIGTERM, SIGHUP or exit, the card out of the guest; unlock, new-card: done
  1  ended by a second signal, without waiting for the guest, or for the tools of new-card
  2  the command line is wrong
  3  the card cannot be made: keys, certificate, PIN or state; new-card was interrupted
  4  the connection failed or was lost, with --no-reconnect; was not made in 30 s, with --background
  5  the endpoint cannot be used at all
  6  the card was lost by a fault of vscclient or its libraries; a new start brings it back
A PKCS#11 module that hangs as the program ends is ended by SIGKILL, and that is the status then.";

/// Puts a smartcard into a virtual machine
#[derive(Debug, Parser)]
#[command(version, long_about = LONG_ABOUT, after_long_help = AFTER_HELP)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) serve: Serve,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serves a card that new-card made
    Card(Directory),
    /// Makes a directory with a test card: a CA, certificates, keys and a PIN
    NewCard(NewCard),
    /// Gives a blocked PIN all its tries back
    Unlock(Unlock),
}

/// Which card is meant.
#[derive(Debug, Default, Args)]
pub(crate) struct Card {
    /// Directory of the NSS database, with or without "sql:" [default: /etc/pki/nssdb]
    #[arg(long, value_name = "DIR")]
    db: Option<String>,
    /// Nickname of a certificate whose private key the database holds; once for each. A PIV slot in front says where
    /// it goes, as in 9a=NAME; by default its key usage does. For other keys than a database's: what slot they get
    #[arg(long = "cert", short = 'c', value_name = "[SLOT=]NAME")]
    certificates: Vec<Wanted>,
    /// PEM files with a certificate and its key, or one file with both; once for each
    #[arg(long, value_name = "CERT[,KEY]", conflicts_with_all = ["db", "module", "token"], value_parser = PemSource::pem_option)]
    pem: Vec<PemSource>,
    /// PKCS#12 file with a certificate and its key; once for each
    #[arg(long, value_name = "FILE", conflicts_with_all = ["db", "module", "token"])]
    p12: Vec<PathBuf>,
    /// PKCS#11 module: the card is made of the keys on a token
    #[arg(long, value_name = "FILE")]
    module: Vec<PathBuf>,
    /// Label or serial number of the token; without --module, of those that the modules of --db reach
    #[arg(long, value_name = "LABEL")]
    token: Option<String>,
    /// Tells cards with the same certificates apart; part of the card's identity
    #[arg(long, value_name = "NAME")]
    card_name: Option<String>,
    /// File with the password of the database or the key files, for a card with a PIN of its own or none
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Unlock {
    #[command(flatten)]
    pub(crate) card: Card,
    /// Directory that new-card made
    #[arg(value_name = "DIR", conflicts_with_all = ["db", "certificates", "pem", "p12", "module", "token", "card_name"])]
    directory: Option<PathBuf>,
}

impl Unlock {
    pub(crate) fn run(self) -> Result<String, String> {
        let setup = match self.directory {
            Some(directory) => CardDirectory::open(&directory).and_then(|card| card.setup()),
            None => Ok(self.card.setup()),
        }
        .map_err(|error| error.to_string())?;
        setup.unlock().map_err(|error| error.to_string())
    }
}

/// How a card is served.
#[derive(Debug, Args)]
pub(crate) struct Connection {
    /// End when the connection fails or is lost
    #[arg(long)]
    pub(crate) no_reconnect: bool,
    /// Return when programs see the card (vpcd:), else when virtual machines can have it, and go on in the background;
    /// what stands in its way for 30 s is an error
    #[arg(long)]
    pub(crate) background: bool,
    /// Print each APDU on a line of its own, with the bodies and answers of SELECT and what only reads
    #[arg(long)]
    pub(crate) trace: bool,
    /// Let TCP leave this machine: everything, the PIN too, can be read on the way
    #[arg(long)]
    allow_plaintext: bool,
    /// Verbosity: 0, 1 to 10 for details, above 10 for everything
    #[arg(short = 'd', value_name = "LEVEL", default_value = "0")]
    debug: String,
    /// unix:PATH, tcp:HOST:PORT, unix-listen:PATH or tcp-listen:HOST:PORT; vpcd: for this host's own pcscd, or
    /// vpcd:HOST:PORT,slot=N; or HOST PORT as for the old vscclient
    // Three are a command after options, which gets a better answer than clap's.
    #[arg(value_name = "ENDPOINT", num_args = 1..=3, required = true)]
    endpoint: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Directory {
    /// Directory that new-card made
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Let the card be written to by those who know its management key: certificates and other data, new keys
    #[arg(long)]
    writable: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

impl Directory {
    pub(crate) fn card(&self) -> Result<CardSpec, String> {
        let directory = CardDirectory::open(&self.directory).map_err(|error| error.to_string())?;
        let setup = match self.writable {
            true => directory.writable(),
            false => directory.setup(),
        };
        let mut setup = setup.map_err(|error| error.to_string())?;
        setup.unlock = Some(format!("vscclient unlock {}", shell_word(directory.path())));
        Ok(CardSpec {
            card: Wish::Made(Box::new(setup)),
            reader: directory.name().to_owned(),
            directory: Some(directory.path().to_owned()),
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    card: Card,
    /// Serve the card in a reader of this host as it is: a part of the reader's name, * for anything, '' for any
    #[arg(long, value_name = "READER", conflicts_with_all = [
        "db", "certificates", "pem", "p12", "module", "token", "card_name", "password_file", "profile", "pin_file",
        "puk_file", "no_pin", "forget_pin", "legacy",
    ])]
    pcsc: Option<String>,
    /// Keep the host's other programs from that card while the guest uses it
    #[arg(long, requires = "pcsc")]
    exclusive: bool,
    /// As what the card shows itself: piv, cac, or dual for both
    #[arg(long, value_name = "PROFILE", default_value = "dual")]
    profile: Profile,
    /// File with a PIN of 4 to 8 characters (PIV: 6 to 8 digits) that the card gets for its own; used once, kept as a
    /// hash
    #[arg(long, value_name = "FILE")]
    pin_file: Option<PathBuf>,
    /// File with a PUK of 8 characters that such a card gets, to unblock its PIN
    #[arg(long, value_name = "FILE")]
    puk_file: Option<PathBuf>,
    /// Take any PIN for right: everyone in the guest can use the keys
    #[arg(long, conflicts_with = "pin_file")]
    no_pin: bool,
    /// Forget a verified PIN after this many idle seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400 * 365))]
    forget_pin: Option<u64>,
    /// Tries of the PIN that the guest cannot use [default: 1 for --pcsc and tokens, else 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=15))]
    keep_tries: Option<u8>,
    /// Options string of the old vscclient
    #[arg(short = 'e', value_name = "OPTIONS", conflicts_with_all = ["db", "pem", "p12", "module", "token"])]
    legacy: Option<String>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// Which card is meant, defaults filled in.
#[derive(Debug)]
pub(crate) struct CardSpec {
    pub(crate) card: Wish,
    /// What the guest's host calls the reader.
    pub(crate) reader: String,
    /// The directory that it is in, if it is one of new-card's.
    pub(crate) directory: Option<PathBuf>,
}

/// A card that is to be made, or one that is there.
#[derive(Debug)]
pub(crate) enum Wish {
    Made(Box<CardSetup>),
    Raw(RawSetup),
}

impl Wish {
    pub(crate) fn open(&self) -> Result<OpenCard, SetupError> {
        match self {
            Self::Made(setup) => setup.open(),
            Self::Raw(setup) => setup.open(),
        }
    }
}

/// systemd tells a service alone where its state is.
fn unlock_command(setup: &CardSetup) -> Option<String> {
    let state = std::env::var_os("STATE_DIRECTORY");
    let state = state.map(|place| format!("STATE_DIRECTORY={} ", shell_word(place))).unwrap_or_default();
    Some(format!("{state}vscclient unlock {}", setup.options()?))
}

fn reader_name(card_name: &str) -> String {
    if card_name.is_empty() { "Virtual Reader".into() } else { card_name.to_owned() }
}

impl Card {
    /// Without what only serving it needs.
    fn setup(self) -> CardSetup {
        let db = || self.db.clone().unwrap_or_else(|| "/etc/pki/nssdb".into());
        let keys = if !self.pem.is_empty() || !self.p12.is_empty() {
            Keys::Files(self.pem.into_iter().chain(self.p12.into_iter().map(PemSource::Pkcs12)).collect())
        } else if self.module.is_empty() && self.token.is_none() {
            Keys::Database(db())
        } else {
            let db = if self.module.is_empty() { Some(db()) } else { self.db };
            Keys::Token { modules: self.module, db, token: self.token }
        };
        CardSetup {
            keys,
            certificates: self.certificates,
            card_name: self.card_name.unwrap_or_default(),
            password_file: self.password_file,
            prefix: "--",
            ..CardSetup::default()
        }
    }
}

impl Serve {
    /// The card that the options ask for, old and new ones.
    pub(crate) fn card(&mut self) -> Result<CardSpec, String> {
        if matches!(self.connection.endpoint.as_slice(), [command, _, _] if command == "card") {
            return Err("options come after `card`: vscclient card [OPTIONS] DIR ENDPOINT".into());
        }
        if let Some(reader) = self.pcsc.take() {
            let config = PcscConfig { reader, exclusive: self.exclusive };
            let raw = RawSetup { config, keep_tries: self.keep_tries };
            return Ok(CardSpec { card: Wish::Raw(raw), reader: reader_name(""), directory: None });
        }
        if self.exclusive {
            // clap lets it pass beside options that --pcsc excludes.
            return Err("--exclusive goes with --pcsc".into());
        }
        let mut setup = std::mem::take(&mut self.card).setup();
        let mut reader = reader_name(&setup.card_name);
        setup.profile = self.profile;
        setup.pin_file = self.pin_file.take();
        setup.puk_file = self.puk_file.take();
        setup.no_pin = self.no_pin;
        setup.forget_pin = self.forget_pin.map(Duration::from_secs);
        setup.keep_tries = self.keep_tries;
        if let Some(text) = &self.legacy {
            let options = legacy::parse(text).map_err(|error| error.to_string())?;
            let db = options.db.unwrap_or_else(|| "/etc/pki/nssdb".into());
            setup.keys = Keys::Database(db.clone());
            // libcacard's cards are CACs.
            setup.profile = Profile::Cac;
            let readers = options.soft.len() + usize::from(!setup.certificates.is_empty());
            if readers > 1 {
                return Err(format!(
                    "-e: {readers} readers are asked for, and a VSCard host such as QEMU has one; \
                     start one vscclient for each"
                ));
            }
            if options.hardware == Some(true) && readers > 0 {
                return Err(
                    "-e: use_hw=yes asks for a hardware token beside the certificates, and there is one reader; \
                     write use_hw=no"
                        .into(),
                );
            }
            for soft in options.soft {
                setup.certificates =
                    soft.certificates.into_iter().map(|name| Wanted { slot: None, name }).collect();
                reader = soft.reader;
            }
            if setup.certificates.is_empty() {
                if options.hardware == Some(false) {
                    return Err("-e: no certificate is named; add soft=(...) or -c".into());
                }
                setup.keys = Keys::Token { modules: Vec::new(), db: Some(db), token: None };
            }
        }
        if matches!(setup.keys, Keys::Database(_)) && setup.certificates.is_empty() {
            return Err("what is to be on the card? --cert NAME, once for each certificate of the database; or --pem, \
                        --p12, --module, --token or --pcsc; or `vscclient card DIR ENDPOINT`"
                .into());
        }
        setup.unlock = unlock_command(&setup);
        Ok(CardSpec { card: Wish::Made(Box::new(setup)), reader, directory: None })
    }
}

impl Connection {
    pub(crate) fn endpoint(&self) -> Result<Endpoint, String> {
        let text = match self.endpoint.as_slice() {
            [host, port] if host.contains(':') => {
                let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                format!("tcp:[{}]:{port}", bare.unwrap_or(host))
            }
            [host, port] => format!("tcp:{host}:{port}"),
            [endpoint] if self.is_vpcd() => return vpcd::endpoint(endpoint),
            [endpoint] => endpoint.clone(),
            other => return Err(format!("{other:?} is no endpoint: one word, or HOST PORT")),
        };
        text.parse().map_err(|error: vscard_protocol::chardev::EndpointError| error.to_string())
    }

    /// Whether the card is for the host's own pcscd.
    pub(crate) fn is_vpcd(&self) -> bool {
        matches!(self.endpoint.as_slice(), [endpoint] if endpoint.starts_with(vpcd::PREFIX))
    }

    pub(crate) fn plaintext(&self) -> Plaintext {
        if self.allow_plaintext { Plaintext::Anywhere } else { Plaintext::LoopbackOnly }
    }

    /// As the old vscclient: what is no number means 1.
    pub(crate) fn debug_level(&self) -> u32 {
        self.debug.parse().unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn serve(args: &[&str]) -> Serve {
        Cli::try_parse_from([&["vscclient"], args].concat()).unwrap().serve
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn made(args: &[&str]) -> (CardSetup, String) {
        match serve(args).card().unwrap() {
            CardSpec { card: Wish::Made(setup), reader, .. } => (*setup, reader),
            other => panic!("{other:?}"),
        }
    }

    fn database(setup: &CardSetup) -> (&str, Vec<&str>) {
        let Keys::Database(db) = &setup.keys else { panic!("{:?}", setup.keys) };
        (db, setup.certificates.iter().map(|wanted| wanted.name.as_str()).collect())
    }

    #[test]
    fn new_and_old_forms_mean_the_same_keys() {
        let new = ["--db", "sql:/d", "--cert", "a", "--cert", "b", "tcp:localhost:2001"];
        let old = ["-e", "db=\"sql:/d\" use_hw=no soft=(,Virtual Reader,CAC,,a,b)", "localhost", "2001"];
        let mixed = ["-e", "db=\"sql:/d\" use_hw=no", "-c", "a", "-c", "b", "localhost", "2001"];
        assert_eq!(serve(&new).connection.endpoint(), serve(&old).connection.endpoint());
        for (form, profile) in [(&new[..], Profile::Dual), (&old, Profile::Cac), (&mixed, Profile::Cac)] {
            let (setup, reader) = made(form);
            assert_eq!(database(&setup), ("sql:/d", vec!["a", "b"]));
            assert_eq!((setup.profile, reader.as_str()), (profile, "Virtual Reader"));
        }
        assert_eq!(database(&made(&["-c", "a", "host", "1"]).0).0, "/etc/pki/nssdb");
        assert_eq!(serve(&["-d", "x", "-c", "a", "host", "1"]).connection.debug_level(), 1);
    }

    #[test]
    fn each_source_of_keys() {
        let (setup, _) = made(&["--pem", "a.crt,a.key", "--p12", "b.p12", "--cert", "9e=a", "unix:/x"]);
        assert!(matches!(&setup.keys, Keys::Files(files) if files.len() == 2));
        assert_eq!(setup.certificates[0].slot.map(|slot| slot.to_string()).as_deref(), Some("9e"));
        let (setup, _) = made(&["--module", "/m.so", "unix:/x"]);
        assert!(matches!(&setup.keys, Keys::Token { modules, db: None, token: None } if modules.len() == 1));
        let (setup, _) = made(&["--token", "mine", "unix:/x"]);
        assert!(matches!(&setup.keys, Keys::Token { db: Some(db), .. } if db == "/etc/pki/nssdb"));
        let (setup, _) = made(&["-e", "db=\"/d\"", "h", "1"]);
        assert!(matches!(&setup.keys, Keys::Token { db: Some(db), .. } if db == "/d"));
        let raw = serve(&["--pcsc", "Yubico*", "--keep-tries", "2", "unix:/x"]).card().unwrap();
        assert!(matches!(raw.card, Wish::Raw(raw) if raw.keep_tries == Some(2)));
        for wrong in [
            &["--pcsc", "", "--cert", "a", "unix:/x"][..],
            &["--db", "/d", "--pem", "a", "unix:/x"],
            &["--profile", "openpgp", "--cert", "a", "unix:/x"],
        ] {
            assert!(Cli::try_parse_from([&["vscclient"], wrong].concat()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_cannot_be_served_is_said() {
        let error = |args: &[&str]| serve(args).card().unwrap_err();
        assert!(error(&["unix:/x"]).contains("--cert NAME"));
        assert!(error(&["--exclusive", "--cert", "a", "unix:/x"]).contains("--pcsc"));
        assert!(error(&["-e", "use_hw=maybe", "h", "1"]).contains("use_hw=maybe"));
        assert!(error(&["-e", "db=\"/d\" use_hw=no", "h", "1"]).contains("no certificate is named"));
        assert!(
            error(&["-e", "soft=(,A,CAC,,a) soft=(,B,CAC,,b)", "h", "1"]).contains("2 readers are asked for")
        );
        assert!(error(&["--trace", "card", "jane", "vpcd:"]).contains("options come after `card`"));
        let endpoint = |words: &[&str]| serve(&[&["-c", "a"], words].concat()).connection.endpoint();
        assert!(endpoint(&["nowhere"]).unwrap_err().contains("expected unix:PATH"));
        assert!(endpoint(&["h", "1", "2"]).unwrap_err().contains("HOST PORT"));
    }

    #[test]
    fn an_ipv6_address_may_have_its_brackets() {
        let endpoint = |host: &str| serve(&["-c", "a", host, "2001"]).connection.endpoint();
        assert_eq!(endpoint("[::1]"), endpoint("::1"));
        assert!(endpoint("::1").is_ok() && endpoint("[[::1]]").is_err());
    }

    #[test]
    fn commands_stand_alone() {
        let cli = Cli::try_parse_from(["vscclient", "unlock", "--db", "/d"]).unwrap();
        let Some(Command::Unlock(unlock)) = cli.command else { panic!("no command") };
        assert_eq!(database(&unlock.card.setup()).0, "/d");
        let cli = Cli::try_parse_from(["vscclient", "card", "jane", "localhost", "2001"]).unwrap();
        let Some(Command::Card(card)) = cli.command else { panic!("no command") };
        assert_eq!(card.directory.to_str(), Some("jane"));
        assert_eq!(
            card.connection.endpoint().map(|endpoint| endpoint.to_string()),
            Ok("tcp:localhost:2001".into())
        );
        assert!(Cli::try_parse_from(["vscclient", "--cert", "a"]).is_err());
    }
}
