//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use emulated_card::certificates::CertificateCard;
use vscard_protocol::chardev::{Endpoint, Plaintext};

use crate::legacy;
use crate::new_card::NewCard;

const LONG_ABOUT: &str = "\
Puts a smartcard into a virtual machine: up to ten certificates of an NSS database appear as a CAC in the guest \
of any VMM that has a VSCard host, such as QEMU's ccid-card-passthru.";

const AFTER_HELP: &str = "\
Examples:
  # QEMU: -usb -device usb-ccid,bus=usb-bus.0
  #       -chardev socket,id=card,path=/run/vm1.sock,server=on,wait=off
  #       -device ccid-card-passthru,chardev=card
  vscclient --db sql:$HOME/certs --cert id --cert sign unix:/run/vm1.sock

  # QEMU connects: -chardev socket,id=card,path=/run/card.sock,reconnect=1
  vscclient --db sql:$HOME/certs --cert id unix-listen:/run/card.sock

  # A database without a password: the card gets a PIN of its own
  vscclient --db certs --cert id --pin-file pin.txt tcp:localhost:2001

  # After too many wrong PINs
  vscclient unlock --db sql:$HOME/certs

  # As documentation of the old vscclient has it
  vscclient -e 'db=\"sql:/certs\" use_hw=no soft=(,Reader,CAC,,id,sign)' localhost 2001

Commands on a terminal: insert, remove, select, list, debug, help, exit.

Exit status:
  0  ended by the user (SIGINT, SIGTERM or exit), the card taken out of the guest if it was in
  1  ended by a second signal, without waiting for the guest
  2  the command line is wrong
  3  the card cannot be made: database, certificate, PIN or state
  4  the connection failed or was lost, with --no-reconnect
  5  the endpoint cannot be used at all";

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
    /// Gives a blocked PIN all its tries back
    Unlock(Unlock),
    /// Makes a directory with a test card: certificates, keys, PIN
    NewCard(NewCard),
}

/// Which card is meant.
#[derive(Debug, Args)]
pub(crate) struct Card {
    /// Directory of the NSS database, with or without "sql:" [default: /etc/pki/nssdb]
    #[arg(long, value_name = "DIR")]
    db: Option<String>,
    /// Nickname of a certificate whose private key the database holds; once for each, 1 to 10
    #[arg(long = "cert", short = 'c', value_name = "NAME")]
    certificates: Vec<String>,
    /// Tells cards with the same certificates apart; part of the card's identity
    #[arg(long, value_name = "NAME")]
    card_name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Unlock {
    #[command(flatten)]
    pub(crate) card: Card,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    card: Card,
    /// File with a PIN of 4 to 8 characters that the card gets for its own; used once, kept as a hash
    #[arg(long, value_name = "FILE")]
    pin_file: Option<PathBuf>,
    /// File with the database's password, for a card with a PIN of its own or none
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Take any PIN for right: everyone in the guest can use the keys
    #[arg(long, conflicts_with = "pin_file")]
    no_pin: bool,
    /// Forget a verified PIN after this many idle seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400 * 365))]
    forget_pin: Option<u64>,
    /// End when the connection fails or is lost
    #[arg(long)]
    pub(crate) no_reconnect: bool,
    /// Print each APDU on a line of its own, without PINs and decrypted data
    #[arg(long)]
    pub(crate) trace: bool,
    /// Let TCP leave this machine: everything, the PIN too, can be read on the way
    #[arg(long)]
    allow_plaintext: bool,
    /// Options string of the old vscclient
    #[arg(short = 'e', value_name = "OPTIONS", conflicts_with = "db")]
    legacy: Option<String>,
    /// Verbosity: 0, 1 to 10 for details, above 10 for everything
    #[arg(short = 'd', value_name = "LEVEL", default_value = "0")]
    debug: String,
    /// unix:PATH, tcp:HOST:PORT, unix-listen:PATH or tcp-listen:HOST:PORT; or HOST PORT as for the old vscclient
    #[arg(value_name = "ENDPOINT", num_args = 1..=2, required = true)]
    endpoint: Vec<String>,
}

/// Which card is meant, defaults filled in.
#[derive(Debug)]
pub(crate) struct CardSpec {
    pub(crate) card: CertificateCard,
    /// What the guest's host calls the reader.
    pub(crate) reader: String,
}

impl Card {
    pub(crate) fn spec(self) -> CardSpec {
        let card_name = self.card_name.unwrap_or_default();
        CardSpec {
            reader: if card_name.is_empty() { "Virtual Reader".into() } else { card_name.clone() },
            card: CertificateCard {
                db: self.db.unwrap_or_else(|| "/etc/pki/nssdb".into()),
                certificates: self.certificates,
                card_name,
                prefix: "--",
                ..CertificateCard::default()
            },
        }
    }
}

impl Serve {
    /// The card that the options ask for, old and new ones.
    pub(crate) fn card(&mut self) -> Result<CardSpec, String> {
        let taken = Card {
            db: self.card.db.take(),
            certificates: std::mem::take(&mut self.card.certificates),
            card_name: self.card.card_name.take(),
        };
        let mut spec = taken.spec();
        spec.card.pin_file = self.pin_file.take();
        spec.card.password_file = self.password_file.take();
        spec.card.no_pin = self.no_pin;
        spec.card.forget_pin = self.forget_pin.map(Duration::from_secs);
        if let Some(text) = &self.legacy {
            let options = legacy::parse(text).map_err(|error| error.to_string())?;
            if let Some(db) = options.db {
                spec.card.db = db;
            }
            let readers = options.soft.len() + usize::from(!spec.card.certificates.is_empty());
            if readers > 1 {
                return Err(format!(
                    "-e: {readers} readers are asked for, and a VSCard host such as QEMU has one; \
                     start one vscclient for each"
                ));
            }
            if options.hardware == Some(true) && !options.soft.is_empty() {
                return Err(
                    "-e: use_hw=yes asks for hardware tokens, which are not served; write use_hw=no".into()
                );
            }
            for soft in options.soft {
                spec.card.certificates = soft.certificates;
                spec.reader = soft.reader;
            }
            if spec.card.certificates.is_empty() {
                return Err(if options.hardware != Some(false) {
                    "-e: hardware tokens are not served; name certificates with soft=(...) or -c".into()
                } else {
                    "-e: no certificate is named; add soft=(...) or -c".into()
                });
            }
        }
        if spec.card.certificates.is_empty() {
            return Err("no certificate is named; add --cert NAME, once for each of 1 to 10".into());
        }
        Ok(spec)
    }

    pub(crate) fn endpoint(&self) -> Result<Endpoint, String> {
        let text = match self.endpoint.as_slice() {
            [host, port] if host.contains(':') => format!("tcp:[{host}]:{port}"),
            [host, port] => format!("tcp:{host}:{port}"),
            [endpoint] => endpoint.clone(),
            _ => return Err("the endpoint is missing".into()),
        };
        text.parse().map_err(|error: vscard_protocol::chardev::EndpointError| error.to_string())
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

    #[test]
    fn new_and_old_forms_mean_the_same_card() {
        let mut new = serve(&["--db", "sql:/d", "--cert", "a", "--cert", "b", "tcp:localhost:2001"]);
        let mut old =
            serve(&["-e", "db=\"sql:/d\" use_hw=no soft=(,Virtual Reader,CAC,,a,b)", "localhost", "2001"]);
        let mut mixed = serve(&["-e", "db=\"sql:/d\" use_hw=no", "-c", "a", "-c", "b", "localhost", "2001"]);
        assert_eq!(new.endpoint(), old.endpoint());
        for form in [&mut new, &mut old, &mut mixed] {
            let CardSpec { card, reader } = form.card().unwrap();
            assert_eq!((card.db.as_str(), reader.as_str()), ("sql:/d", "Virtual Reader"));
            assert_eq!(card.certificates, ["a", "b"]);
        }
        assert_eq!(serve(&["-c", "a", "host", "1"]).card().unwrap().card.db, "/etc/pki/nssdb");
        assert_eq!(serve(&["-d", "x", "-c", "a", "host", "1"]).debug_level(), 1);
    }

    #[test]
    fn what_cannot_be_served_is_said() {
        let error = |args: &[&str]| serve(args).card().unwrap_err();
        assert!(error(&["unix:/x"]).contains("add --cert"));
        assert!(error(&["-e", "db=\"/d\"", "h", "1"]).contains("hardware tokens are not served"));
        assert!(error(&["-e", "use_hw=maybe", "h", "1"]).contains("use_hw=maybe"));
        assert!(
            error(&["-e", "soft=(,A,CAC,,a) soft=(,B,CAC,,b)", "h", "1"]).contains("2 readers are asked for")
        );
        assert!(serve(&["-c", "a", "nowhere"]).endpoint().unwrap_err().contains("expected unix:PATH"));
    }

    #[test]
    fn unlock_needs_no_endpoint() {
        let cli = Cli::try_parse_from(["vscclient", "unlock", "--db", "/d"]).unwrap();
        let Some(Command::Unlock(unlock)) = cli.command else { panic!("no command") };
        assert_eq!(unlock.card.spec().card.db, "/d");
        assert!(Cli::try_parse_from(["vscclient", "--cert", "a"]).is_err());
    }
}
